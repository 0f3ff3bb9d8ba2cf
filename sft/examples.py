"""Encoded examples: what is selected of them for training, what is counted, and what is said.

An example is a record as token ids. Its trained tokens are those with a label; all others have the
label -100.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import tokenizers
import xxhash

from sft.console import printable, say
from sft.conversations import RecordError, find_ignored_keys, parse_json, parse_record
from sft.errors import UserError

IGNORE_INDEX = -100  # the label that PyTorch's cross entropy, and every library around it, skips
MAX_REASONS = 20  # shown of refused rows
MAX_PLACES = 3  # shown of each reason

INT32 = datasets.Value("int32")
ENCODED_FEATURES = datasets.Features(
    {
        "file": INT32,  # its index among the paths
        "line": INT32,  # from 1: the line of JSON Lines, elsewhere the row
        "error": datasets.Value("string"),  # why the record is refused, "" if it is not
        "ignored_keys": datasets.Value("string"),  # names without effect, a JSON list
        "input_ids": datasets.List(INT32),
        "labels": datasets.List(INT32),
        "num_tokens": INT32,
        "num_answer_tokens": INT32,  # those that have a label
        "num_control_tokens": INT32,  # those spelled in its texts
        "digest": datasets.Value("int64"),  # of its ids and labels
    }
)


# ---- From a batch of records to columns ---------------------------------------------------------
def parse_records(batch: dict, system_prompt: str, train_on: str) -> tuple[list, dict[str, list]]:
    """Return the conversations of a batch of raw records, and the columns error and ignored_keys.

    A record that is refused has no messages.
    """
    conversations = []
    errors = []
    ignored_keys = []
    for text, error in zip(batch["text"], batch["error"]):
        messages = []
        ignored = []
        if not error:
            try:
                record = parse_json(text)
                messages = parse_record(record, system_prompt, train_on)
                ignored = find_ignored_keys(record)
            except RecordError as refusal:
                error = str(refusal)
        conversations.append(messages)
        errors.append(error)
        ignored_keys.append(json.dumps(ignored))
    return conversations, {"error": errors, "ignored_keys": ignored_keys}


def make_token_columns(
    conversations: list[list[dict]], encodings: list[dict], tokenizer: tokenizers.Tokenizer
) -> dict[str, list]:
    """Return the columns of ENCODED_FEATURES that come from {"input_ids", "labels"}."""
    columns = {
        "input_ids": [],
        "labels": [],
        "num_tokens": [],
        "num_answer_tokens": [],
        "num_control_tokens": [],
        "digest": [],
    }
    control_tokens = match_control_tokens(tokenizer)
    for messages, encoding in zip(conversations, encodings):
        input_ids = np.array(encoding["input_ids"], np.int32)
        labels = np.array(encoding["labels"], np.int32)
        num_control_tokens = 0
        for message in messages:
            num_control_tokens += len(control_tokens.findall(message["content"]))
        columns["input_ids"].append(input_ids)
        columns["labels"].append(labels)
        columns["num_tokens"].append(len(input_ids))
        columns["num_answer_tokens"].append(np.count_nonzero(labels != IGNORE_INDEX))
        columns["num_control_tokens"].append(num_control_tokens)
        digest = xxhash.xxh64_intdigest(input_ids.tobytes() + labels.tobytes())
        columns["digest"].append(digest >> 1)  # an int64 has room for 63 bits
    return columns


def match_control_tokens(tokenizer: tokenizers.Tokenizer) -> re.Pattern:
    texts = []
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.special:
            texts.append(re.escape(token.content))
    if not texts:
        return re.compile("(?!)")  # matches nothing
    return re.compile("|".join(texts))


# ---- Examples -----------------------------------------------------------------------------------
@dataclass(kw_only=True)
class Counts:
    """What became of the rows that were read.

    num_rows = num_trained + num_held_out + num_dropped + num_rejected, and
    answer_tokens = trained_tokens + held_out_tokens + cut_tokens + dropped_tokens.
    """

    num_rows: int
    num_trained: int
    num_held_out: int = 0  # drawn for validation
    num_dropped: int = 0  # too long, or none of the answer within max_len
    num_rejected: int = 0  # refused, and skipped by --skip_bad_rows
    num_cut: int = 0  # trained or held out, but cut to max_len
    answer_tokens: int
    trained_tokens: int
    held_out_tokens: int = 0
    cut_tokens: int = 0
    dropped_tokens: int = 0
    control_tokens: int = 0  # spelled in texts, where they are plain text
    ignored_keys: list[str] = field(default_factory=list)
    files: dict[str, list[int]] = field(default_factory=dict)  # {path: [rows, rows trained]}


class Examples:
    """Examples as torch's loaders ask for them: each is cut to max_len.

    examples[i] is {"input_ids": int32 [T], "labels": int32 [T], "source": "file:line"}. `lengths`
    and `num_answer_tokens` are int32 [number of examples], after the cut.
    """

    def __init__(
        self,
        encoded: datasets.Dataset,
        paths: list[Path],
        indices: np.ndarray,
        lengths: np.ndarray,
        num_answer_tokens: np.ndarray,
        counts: Counts,
    ):
        self.encoded = encoded
        self.paths = paths
        self.indices = indices  # of the encoded records that are examples
        self.lengths = lengths
        self.num_answer_tokens = num_answer_tokens
        self.counts = counts

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict:
        index = self.indices[i]  # IndexError behind the last
        length = self.lengths[i]
        columns = self.encoded.data
        # Copies: the cache's own memory cannot be written to.
        input_ids = columns["input_ids"][index].values.to_numpy()[:length].copy()
        labels = columns["labels"][index].values.to_numpy()[:length].copy()
        source = name_source(self.encoded, self.paths, index)
        return {"input_ids": input_ids, "labels": labels, "source": source}

    def digest(self, order=None) -> str:
        """Return a SHA-256 of the ids and labels of these examples in an order of their numbers."""
        if order is None:
            order = np.arange(len(self))
        order = np.asarray(order)
        digests = get_column(self.encoded, "digest")[self.indices][order]
        return hashlib.sha256(digests.tobytes() + self.lengths[order].tobytes()).hexdigest()

    def largest_token_id(self) -> int:
        """Return the largest token id of all records: the embedding must have more rows."""
        largest = 0
        for chunk in self.encoded.data["input_ids"].chunks:
            token_ids = chunk.flatten()
            if len(token_ids):
                largest = max(largest, pc.max(token_ids).as_py())
        return largest


def get_column(encoded: datasets.Dataset, name: str) -> np.ndarray:
    return encoded.data[name].to_numpy()


def name_source(encoded: datasets.Dataset, paths: list[Path], index: int) -> str:
    """Return "file:line" of an encoded record."""
    file = encoded.data["file"][index].as_py()
    line = encoded.data["line"][index].as_py()
    return f"{paths[file]}:{line}"


# ---- Selection ----------------------------------------------------------------------------------
def select_examples(
    encoded: datasets.Dataset,
    paths: list[Path],
    max_len: int,
    overflow_strategy: str,
    skip_bad_rows: bool,
) -> Examples:
    """Return the examples to train on, cut to max_len, and with them what became of all rows.

    A row is dropped where none of its answer is within max_len, and with "drop" where it is longer.
    Raises UserError for refused rows without skip_bad_rows, for long rows with "error", and where
    nothing is left.
    """
    check_rejected(encoded, paths, skip_bad_rows)
    num_tokens = get_column(encoded, "num_tokens")
    answer_tokens = get_column(encoded, "num_answer_tokens")
    if overflow_strategy == "error":
        check_lengths(encoded, paths, max_len)
    kept_tokens = count_kept_tokens(encoded, max_len, overflow_strategy)
    indices = np.flatnonzero(kept_tokens)
    if len(indices) == 0:
        good = num_tokens[num_tokens > 0]
        raise UserError(
            f"{paths[0]}: no answer begins within max_len {max_len}: rows have {good.min():,} to "
            f"{good.max():,} tokens; raise --max_len to {good.min()} or more"
        )
    is_dropped = (kept_tokens == 0) & (num_tokens > 0)
    counts = Counts(
        num_rows=len(encoded),
        num_trained=len(indices),
        num_held_out=0,
        # json writes Python's numbers only.
        num_dropped=int(np.count_nonzero(is_dropped)),
        num_rejected=int(np.count_nonzero(num_tokens == 0)),
        num_cut=int(np.count_nonzero(num_tokens[indices] > max_len)),
        answer_tokens=int(answer_tokens.sum()),
        trained_tokens=int(kept_tokens.sum()),
        held_out_tokens=0,
        cut_tokens=int((answer_tokens - kept_tokens)[indices].sum()),
        dropped_tokens=int(answer_tokens[is_dropped].sum()),
        control_tokens=int(get_column(encoded, "num_control_tokens").sum()),
        ignored_keys=find_all_ignored_keys(encoded),
        files=count_by_file(encoded, paths, indices),
    )
    lengths = np.minimum(num_tokens[indices], max_len)
    return Examples(encoded, paths, indices, lengths, kept_tokens[indices], counts)


def count_kept_tokens(
    encoded: datasets.Dataset, max_len: int, overflow_strategy: str
) -> np.ndarray:
    """Return how many answer tokens of each record stand within max_len, int32 [records]."""
    kept_tokens = get_column(encoded, "num_answer_tokens").copy()
    for index in np.flatnonzero(get_column(encoded, "num_tokens") > max_len):
        if overflow_strategy == "drop":
            kept_tokens[index] = 0
        else:
            labels = encoded.data["labels"][index].values.to_numpy()[:max_len]
            kept_tokens[index] = np.count_nonzero(labels != IGNORE_INDEX)
    return kept_tokens


def find_all_ignored_keys(encoded: datasets.Dataset) -> list[str]:
    keys = set()
    for names in encoded.data["ignored_keys"].unique().to_pylist():
        keys.update(json.loads(names))
    return sorted(keys)


def count_by_file(
    encoded: datasets.Dataset, paths: list[Path], indices: np.ndarray
) -> dict[str, list[int]]:
    """Return {path: [its rows, those of them that are trained]}."""
    files = get_column(encoded, "file")
    num_rows = np.bincount(files, minlength=len(paths))
    num_trained = np.bincount(files[indices], minlength=len(paths))
    counts = {}
    for i, path in enumerate(paths):
        counts[str(path)] = [int(num_rows[i]), int(num_trained[i])]
    return counts


def check_lengths(encoded: datasets.Dataset, paths: list[Path], max_len: int) -> None:
    """Raise UserError that names the first row over max_len, and what the longest one needs."""
    num_tokens = get_column(encoded, "num_tokens")
    over = np.flatnonzero(num_tokens > max_len)
    if len(over):
        first = over[0]
        raise UserError(
            f"{name_source(encoded, paths, first)}: {num_tokens[first]:,} tokens, and max_len is "
            f"{max_len:,} ({len(over):,} such rows, the longest has {num_tokens.max():,}); raise "
            "--max_len or choose another --overflow_strategy"
        )


def split_examples(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Return (train, validation): a share of the examples, drawn by the seed, is not trained."""
    check_share(len(examples), share)
    num_held_out = count_held_out(len(examples), share)
    order = np.random.default_rng(seed).permutation(len(examples))
    held_out = np.sort(order[:num_held_out])
    trained = np.sort(order[num_held_out:])
    counts = examples.counts
    held_out_tokens = int(examples.num_answer_tokens[held_out].sum())
    train_counts = replace(
        counts,
        num_trained=len(trained),
        num_held_out=num_held_out,
        trained_tokens=counts.trained_tokens - held_out_tokens,
        held_out_tokens=held_out_tokens,
        files=count_by_file(examples.encoded, examples.paths, examples.indices[trained]),
    )
    validation_counts = Counts(
        num_rows=num_held_out,
        num_trained=num_held_out,
        answer_tokens=held_out_tokens,
        trained_tokens=held_out_tokens,
    )
    train = take_examples(examples, trained, train_counts)
    return train, take_examples(examples, held_out, validation_counts)


def check_share(num_examples: int, share: float) -> None:
    """Raise UserError where a share of the examples is none or all of them."""
    if 0 < share < 1 and 0 < count_held_out(num_examples, share) < num_examples:
        return
    raise UserError(
        f"--validation_split {share} of {num_examples} rows leaves no row to train or none to "
        "evaluate; give a share between 0 and 1, or a file of validation rows"
    )


def count_held_out(num_examples: int, share: float) -> int:
    """Return how many of the examples are drawn for validation."""
    return round(share * num_examples)


def take_examples(examples: Examples, numbers: np.ndarray, counts: Counts) -> Examples:
    return Examples(
        examples.encoded,
        examples.paths,
        examples.indices[numbers],
        examples.lengths[numbers],
        examples.num_answer_tokens[numbers],
        counts,
    )


# ---- What is refused ----------------------------------------------------------------------------
def check_rejected(encoded: datasets.Dataset, paths: list[Path], skip_bad_rows: bool) -> None:
    """Say which rows are refused, and why; raise UserError unless they may be skipped."""
    num_rejected = np.count_nonzero(get_column(encoded, "num_tokens") == 0)
    if num_rejected == 0:
        return
    report = "\n".join(describe_rejected(encoded, paths))
    if num_rejected == len(encoded):
        raise UserError(f"{report}\nall {num_rejected:,} rows are refused; fix them")
    report += f"\n{num_rejected:,} of {len(encoded):,} rows are refused"
    if not skip_bad_rows:
        raise UserError(f"{report}; fix them, or train without them: --skip_bad_rows")
    say(report)


def describe_rejected(encoded: datasets.Dataset, paths: list[Path]) -> list[str]:
    """Return a line for each reason, the most frequent first, with the places of its first rows."""
    places_by_reason = {}
    for source, reason in iterate_rejected(encoded, paths):
        places_by_reason.setdefault(reason, []).append(source)
    reasons = sorted(places_by_reason, key=lambda reason: -len(places_by_reason[reason]))
    lines = []
    for reason in reasons[:MAX_REASONS]:
        places = places_by_reason[reason]
        if len(places) == 1:
            lines.append(f"{places[0]}: {reason}")
        else:
            shown = ", ".join(places[:MAX_PLACES])
            if len(places) > MAX_PLACES:
                shown += ", ..."
            lines.append(f"{len(places):,} rows: {reason}\n    {shown}")
    if len(reasons) > MAX_REASONS:
        lines.append(f"... and {len(reasons) - MAX_REASONS:,} other reasons")
    return lines


def iterate_rejected(encoded: datasets.Dataset, paths: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", reason) of each refused record."""
    for index in np.flatnonzero(get_column(encoded, "num_tokens") == 0):
        yield name_source(encoded, paths, index), encoded.data["error"][index].as_py()


def write_rejected(splits: dict[str, Examples], output_dir: str) -> None:
    """Write a line for each refused row to rejected.jsonl: where it stands, and why."""
    path = Path(output_dir, "rejected.jsonl")
    path.unlink(missing_ok=True)  # the name may be a link to a file of others
    with open(path, "w", encoding="utf-8") as file:
        for examples in splits.values():
            for source, reason in iterate_rejected(examples.encoded, examples.paths):
                line = json.dumps({"source": source, "error": reason}, ensure_ascii=False)
                file.write(line + "\n")


# ---- What is said -------------------------------------------------------------------------------
def print_counts(split: str, counts: Counts) -> None:
    """Print what became of the rows of a split; both sums add up."""
    used = "evaluated"
    if split == "train":
        used = "trained"
    name = "drawn from the train rows"
    if len(counts.files) == 1:
        name = next(iter(counts.files))
    elif counts.files:
        name = f"{len(counts.files)} files"
    rows = f"{counts.num_trained:,} {used}"
    tokens = f"{counts.trained_tokens:,} {used}"
    if counts.num_held_out:
        rows += f" + {counts.num_held_out:,} for validation"
        tokens += f" + {counts.held_out_tokens:,} for validation"
    rows += f" + {counts.num_dropped:,} dropped + {counts.num_rejected:,} rejected"
    tokens += f" + {counts.cut_tokens:,} cut + {counts.dropped_tokens:,} dropped"
    say(f"{split:10} {name}")
    say(f"           {counts.num_rows:,} rows = {rows} ({counts.num_cut:,} cut)")
    say(f"           {counts.answer_tokens:,} answer tokens = {tokens}")
    if len(counts.files) > 1:
        for path, (num_rows, num_trained) in counts.files.items():
            say(f"           {path}: {num_rows:,} rows, {num_trained:,} {used}")
    if counts.control_tokens:
        say(f"           {counts.control_tokens:,} control tokens in texts stay plain text")
    if counts.ignored_keys:
        keys = ", ".join(repr(key) for key in counts.ignored_keys)
        say(f"           ignored keys: {keys[:200]}")
    if 2 * counts.num_dropped >= counts.num_rows - counts.num_rejected:
        say(
            f"warning    {counts.num_dropped:,} of {counts.num_rows:,} rows are dropped for their "
            "length; raise --max_len"
        )


def warn_of_shared_rows(train: Examples, validation: Examples) -> None:
    """Say which validation rows are training rows, too: their loss says nothing of new rows."""
    trained = get_column(train.encoded, "digest")[train.indices]
    evaluated = get_column(validation.encoded, "digest")[validation.indices]
    shared = np.flatnonzero(np.isin(evaluated, trained))
    if len(shared) == 0:
        return
    places = [validation[i]["source"] for i in shared[:MAX_PLACES]]
    say(
        f"warning    {len(shared):,} of {len(validation):,} validation rows are training rows, too "
        f"({', '.join(places)}); eval_loss looks too good"
    )


def mark_trained_tokens(example: dict, tokenizer, color: bool) -> str:
    """Return an example's text with its trained tokens in green, or in brackets."""
    before, after = "⟦", "⟧"
    if color:
        before, after = "\033[32m", "\033[0m"
    text = ""
    is_trained = example["labels"] != IGNORE_INDEX
    for trained, numbers in itertools.groupby(range(len(is_trained)), key=is_trained.__getitem__):
        part = printable(tokenizer.decode(example["input_ids"][list(numbers)]))
        if trained:
            part = before + part + after
        text += part
    return text
