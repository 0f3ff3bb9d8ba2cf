"""Make data/tiny-qwen2, a stand-in for Qwen2-7B that is trained on any laptop, and its questions.

    python tools/make_tiny_qwen2.py           # about 15 minutes on one core
    python tools/make_tiny_qwen2.py --rows    # only the questions of the two data files

The model is a Qwen2 in every respect but size. It is a base model: it has read plain text only.
This script writes that text from tools/tiny_qwen2.toml: facts (capitals, opposites, ...) and worked
examples (sums, numbers in words, sorting, ...), in English and in Chinese. Some are asked and
answered there, as `Question: ... Answer: ...`. What data/validation.jsonl asks is held out:
the model reads such a fact as a statement only, and such a worked example not at all.
The model has also read the longer rows of data/train.jsonl, as plain text. It has seen neither
a chat nor <|im_end|>: fine-tuning teaches those.
"""

import json
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

DATA = Path(__file__).parents[1] / "data"
TEXTS_FILE = Path(__file__).with_name("tiny_qwen2.toml")
TEXTS = tomllib.loads(TEXTS_FILE.read_text(encoding="utf-8"))
FACTS = TEXTS["facts"]
CHINESE_DIGITS = "零一二三四五六七八九"
LANGUAGES = ("en", "zh")
NUM_TRAIN_QUESTIONS = 9  # of each task and language
NUM_VALIDATION_QUESTIONS = 2  # of each task and language
QUESTION_SHARE = 0.4  # of the texts that may be questions
PROSE_SHARE = 0.04  # of the documents

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2 cuts text so before BPE: contractions, words, digits, punctuation, line ends, spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

VOCAB_SIZE = 3072
STEPS = 2400
WARMUP_STEPS = 50
SEQUENCES = 12  # of one step
SEQUENCE_TOKENS = 160
LEARNING_RATE = 2e-3
MATRIX_LEARNING_RATE = 1e-2  # Muon's, for the weights of the layers


# ---- Numbers in words ---------------------------------------------------------------------------
def in_english(n: int) -> str:
    """Return 0 to 999 in words: 347 is three hundred and forty-seven."""
    if n < 20:
        return TEXTS["numbers"]["under_twenty"][n]
    if n < 100:
        words = TEXTS["numbers"]["tens"][n // 10 - 2]
        if n % 10:
            words += f"-{in_english(n % 10)}"
        return words
    words = f"{in_english(n // 100)} hundred"
    if n % 100:
        words += f" and {in_english(n % 100)}"
    return words


def in_chinese(n: int) -> str:
    """Return 0 to 999 in Chinese: 307 is 三百零七, 12 is 十二 and 312 is 三百一十二."""
    if n < 10:
        return CHINESE_DIGITS[n]
    hundreds = n // 100
    tens = n // 10 % 10
    ones = n % 10
    words = ""
    if hundreds:
        words += CHINESE_DIGITS[hundreds] + "百"
    if tens and n >= 20:
        words += CHINESE_DIGITS[tens]
    if tens:
        words += "十"
    elif ones:
        words += "零"
    if ones:
        words += CHINESE_DIGITS[ones]
    return words


# ---- Items: what is true ------------------------------------------------------------------------
@dataclass
class Item:
    """One thing to know, with the values that its wordings need in each language."""

    key: str  # the same in every wording and language
    english: dict[str, str]
    chinese: dict[str, str]

    def values(self, language: str) -> dict[str, str]:
        return self.english if language == "en" else self.chinese


def same_values(key: str, **values: object) -> Item:
    """Return an item whose values are the same in all languages."""
    texts = {name: str(value) for name, value in values.items()}
    return Item(key, texts, texts)


def pair_key(a: int, b: int) -> str:
    return f"{min(a, b)} {max(a, b)}"


def draw_capital(rng: Random) -> Item:
    land, city, land_zh, city_zh = rng.choice(FACTS["capitals"])
    english = {"x": land, "y": city}
    chinese = {"x": land_zh, "y": city_zh}
    return Item(land, english, chinese)


def draw_opposite(rng: Random) -> Item:
    first, second, first_zh, second_zh = rng.choice(FACTS["opposites"])
    english = {"x": first, "y": second}
    chinese = {"x": first_zh, "y": second_zh}
    if rng.random() < 0.5:
        english = {"x": second, "y": first}
        chinese = {"x": second_zh, "y": first_zh}
    return Item(f"{first} {second}", english, chinese)


def draw_word(rng: Random) -> Item:
    english, chinese = rng.choice(FACTS["words"])
    return same_values(english, x=english, y=chinese)


def draw_element(rng: Random) -> Item:
    name, symbol, name_zh = rng.choice(FACTS["elements"])
    english = {"x": name, "y": symbol}
    chinese = {"x": name_zh, "y": symbol}
    return Item(name, english, chinese)


def draw_unit(rng: Random) -> Item:
    large, small, large_zh, small_zh, factor = rng.choice(FACTS["units"])
    n = rng.randint(2, 12)
    m = n * int(factor)
    numbers = {"n": str(n), "m": str(m)}
    english = {"large": large, "small": small, **numbers}
    chinese = {"large": large_zh, "small": small_zh, **numbers}
    return Item(f"{n} {large}", english, chinese)


def draw_product(rng: Random) -> Item:
    a = rng.randint(2, 12)
    b = rng.randint(2, 12)
    return same_values(pair_key(a, b), a=a, b=b, c=a * b)


def draw_sum(rng: Random) -> Item:
    a = rng.randint(2, 60)
    b = rng.randint(2, 60)
    return same_values(pair_key(a, b), a=a, b=b, c=a + b)


def draw_number(rng: Random) -> Item:
    largest = rng.choice([99, 999])
    n = rng.randint(13, largest)
    english = {"n": str(n), "y": in_english(n)}
    chinese = {"n": str(n), "y": in_chinese(n)}
    return Item(str(n), english, chinese)


def draw_larger(rng: Random) -> Item:
    limit = rng.choice([100, 1000])
    a, b = rng.sample(range(10, limit), 2)
    larger = max(a, b)
    smaller = min(a, b)
    return same_values(f"{smaller} {larger}", a=a, b=b, max=larger, min=smaller)


def draw_sorting(rng: Random) -> Item:
    limit = rng.choice([10, 100])
    count = rng.choice([3, 4])
    numbers = rng.sample(range(limit), count)
    shuffled = ", ".join(map(str, numbers))
    numbers.sort()
    ordered = ", ".join(map(str, numbers))
    return same_values(ordered, x=shuffled, y=ordered)


# ---- Tasks: every wording of an item ------------------------------------------------------------
@dataclass
class Wordings:
    """How a task is worded in one language, with the names of an item's values in braces."""

    questions: list[str]
    answer: str
    statements: list[str]


@dataclass
class Task:
    """Items of one kind. A fact that is held out is still read as a statement."""

    draw: Callable[[Random], Item]
    is_fact: bool
    weight: float  # how often the task comes among the texts
    wordings: dict[str, Wordings]


DRAW_FUNCTIONS = {
    "capital": draw_capital,
    "opposite": draw_opposite,
    "word": draw_word,
    "element": draw_element,
    "unit": draw_unit,
    "product": draw_product,
    "sum": draw_sum,
    "number": draw_number,
    "larger": draw_larger,
    "sorting": draw_sorting,
}


def make_task(name: str) -> Task:
    """Return the task that tiny_qwen2.toml describes under this name."""
    entry = TEXTS["tasks"][name]
    wordings = {}
    for language in LANGUAGES:
        wordings[language] = Wordings(**entry[language])
    return Task(
        draw=DRAW_FUNCTIONS[name],
        is_fact=entry["is_fact"],
        weight=entry["weight"],
        wordings=wordings,
    )


TASKS = {name: make_task(name) for name in DRAW_FUNCTIONS}


# ---- Questions: the rows of the two data files --------------------------------------------------
def draw_unused(task: Task, used: set[str], rng: Random) -> Item:
    """Return an item whose key is not among those used."""
    item = task.draw(rng)
    while item.key in used:
        item = task.draw(rng)
    return item


def held_out_items() -> dict[str, list[Item]]:
    """Return for each task the items of data/validation.jsonl: each is asked in one language."""
    rng = Random(18)
    held_out = {}
    for name, task in TASKS.items():
        items = []
        used = set()
        for _ in range(NUM_VALIDATION_QUESTIONS * len(LANGUAGES)):
            item = draw_unused(task, used, rng)
            used.add(item.key)
            items.append(item)
        held_out[name] = items
    return held_out


def write_question(task: Task, item: Item, language: str, rng: Random) -> dict[str, str]:
    wordings = task.wordings[language]
    values = item.values(language)
    question = rng.choice(wordings.questions).format(**values)
    answer = wordings.answer.format(**values)
    return {"query": question, "answer": answer}


def write_questions() -> tuple[list[dict], list[dict]]:
    """Return the questions for training and those for validation, in both languages by turns."""
    rng = Random(2)
    train = []
    validation = []
    for name, items in held_out_items().items():
        task = TASKS[name]
        used = {item.key for item in items}
        for language in LANGUAGES * NUM_VALIDATION_QUESTIONS:
            item = items.pop()
            validation.append(write_question(task, item, language, rng))
        for language in LANGUAGES * NUM_TRAIN_QUESTIONS:
            item = draw_unused(task, used, rng)
            used.add(item.key)
            train.append(write_question(task, item, language, rng))
    rng.shuffle(train)
    return train, validation


def read_prose_lines() -> list[str]:
    """Return the lines of train.jsonl after the questions: people wrote these."""
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").split("\n")
    lines.pop()  # nothing stands after the last line end
    return lines[len(TASKS) * len(LANGUAGES) * NUM_TRAIN_QUESTIONS :]


def write_data_files() -> None:
    """Write validation.jsonl and the first rows of train.jsonl; the rows after them stay."""
    train, validation = write_questions()
    train_lines = list(map(to_json, train))
    train_lines += read_prose_lines()
    validation_lines = map(to_json, validation)
    write_lines(DATA / "train.jsonl", train_lines)
    write_lines(DATA / "validation.jsonl", validation_lines)


def to_json(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            print(line, file=file)


# ---- Text: what the base model reads ------------------------------------------------------------
def draw_text(held_out_keys: dict[str, set[str]], rng: Random) -> str:
    """Return a statement, or a question with its answer if its item is not held out."""
    weights = [task.weight for task in TASKS.values()]
    name = rng.choices(list(TASKS), weights)[0]
    task = TASKS[name]
    language = rng.choice(LANGUAGES)
    item = task.draw(rng)
    while item.key in held_out_keys[name] and not task.is_fact:
        item = task.draw(rng)
    wordings = task.wordings[language]
    if item.key not in held_out_keys[name] and rng.random() < QUESTION_SHARE:
        form = rng.choice(TEXTS["forms"][language])
        question = rng.choice(wordings.questions)
        text = form.format(question=question, answer=wordings.answer)
    else:
        text = rng.choice([wordings.answer, *wordings.statements])
    return text.format(**item.values(language))


def prose_documents() -> list[str]:
    """Return the longer rows of train.jsonl as plain text, their turns in paragraphs."""
    documents = []
    for line in read_prose_lines():
        row = json.loads(line)
        turns = [turn["content"] for turn in row.get("messages", [])]
        for key in ("system", "query", "answer"):
            if key in row:
                turns.append(row[key])
        documents.append("\n\n".join(turns))
    return documents


def draw_documents(seed: int) -> Iterator[str]:
    """Yield documents without end: two to eight texts each, or now and then prose."""
    rng = Random(seed)
    held_out_keys = {}
    for name, items in held_out_items().items():
        held_out_keys[name] = {item.key for item in items}
    prose = prose_documents()
    while True:
        num_texts = rng.randint(2, 8)
        texts = [draw_text(held_out_keys, rng) for _ in range(num_texts)]
        separator = rng.choice([" ", "\n", "\n\n"])
        document = separator.join(texts)
        if rng.random() < PROSE_SHARE:
            document = rng.choice(prose)
        yield document


def vocabulary_texts() -> Iterator[str]:
    """Yield what the vocabulary is learned from: pieces of text, so that no token spans two.

    Chinese writes words without spaces. BPE would make tokens such as 挪威的首都 of whole
    sentences, and a model cannot copy half a token.
    """
    names = set()
    for rows in FACTS.values():
        for row in rows:
            names.update(row)
    for name in sorted(names):
        for _ in range(60):
            yield name
            yield " " + name
    chinese_names = [name for name in sorted(names) if not name.isascii()]
    chinese_names.sort(key=len, reverse=True)
    words = "|".join([*chinese_names, *CHINESE_DIGITS, "十", "百"])
    splitter = pre_tokenizers.Split(Regex(words), behavior="isolated")
    documents = draw_documents(seed=1)
    for _ in range(6000):
        for piece, _ in splitter.pre_tokenize_str(next(documents)):
            yield piece
    yield from prose_documents()


# ---- The model ----------------------------------------------------------------------------------
def make_tokenizer() -> Qwen2Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=CONTROL_TOKENS,
        show_progress=False,
    )
    backend.train_from_iterator(vocabulary_texts(), trainer)
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        bos_token=None,
        additional_special_tokens=CONTROL_TOKENS[1:],
        model_max_length=32768,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Return the model with random weights."""
    endoftext, _, im_end = tokenizer.convert_tokens_to_ids(CONTROL_TOKENS)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,  # 0.02 is for models twenty times as wide
        bos_token_id=endoftext,
        eos_token_id=im_end,
        pad_token_id=endoftext,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=endoftext, pad_token_id=endoftext, eos_token_id=[im_end, endoftext]
    )
    return model


def draw_batches(tokenizer: Qwen2Tokenizer) -> Iterator[torch.Tensor]:
    """Yield input_ids [SEQUENCES, SEQUENCE_TOKENS] of documents laid end to end."""
    endoftext = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    documents = draw_documents(seed=0)
    num_tokens = SEQUENCES * SEQUENCE_TOKENS
    ids = []
    while True:
        while len(ids) < num_tokens:
            ids += tokenizer(next(documents))["input_ids"]
            ids.append(endoftext)
        yield torch.tensor(ids[:num_tokens]).view(SEQUENCES, SEQUENCE_TOKENS)
        ids = ids[num_tokens:]


def learning_rate_share(step: int) -> float:
    """Return the share of the peak: warm-up, flat for half of the run, then down to 0."""
    warm_up = (step + 1) / WARMUP_STEPS
    descent = 2 * (1 - step / STEPS)
    return min(1, warm_up, descent)


def make_optimizers(model: Qwen2ForCausalLM) -> list:
    """Return Muon for the layers' matrices, with which half of AdamW's steps do, and AdamW."""
    matrices = []
    others = []
    for parameter in model.model.layers.parameters():
        if parameter.ndim == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    others += model.model.norm.parameters()
    others += model.model.embed_tokens.parameters()
    muon = torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.01)
    adamw = torch.optim.AdamW(
        others,
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        weight_decay=0,
        fused=True,
    )
    return [muon, adamw]


def pretrain(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Train the model on plain text."""
    optimizers = make_optimizers(model)
    schedules = []
    for optimizer in optimizers:
        schedules.append(torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_share))
    batches = draw_batches(tokenizer)
    losses = []
    for step in range(1, STEPS + 1):
        input_ids = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepped in [*optimizers, *schedules]:
            stepped.step()
        model.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step}/{STEPS}  loss {sum(losses[-100:]) / 100:.4f}", flush=True)
        if step % (STEPS // 4) == 0:
            print(f"known      {count_known(model, tokenizer)}", flush=True)
    with torch.no_grad():
        # The loss drove the rows of <|im_start|> and <|im_end|>, which no text has, away from all
        # others. They begin anew as <|endoftext|>.
        embeddings = model.get_input_embeddings().weight
        embeddings[1:3] = embeddings[0]


def is_known(model, tokenizer, wordings: Wordings, values: dict, form: str) -> bool:
    """Return whether the base gives the answer to the first question, asked in plain text."""
    question = wordings.questions[0]
    text = form.format(question=question, answer="").rstrip().format(**values)
    prompt = tokenizer(text, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    continuation = tokenizer.decode(output[0])[len(text) :]
    answer = wordings.answer.format(**values)
    return continuation.strip().startswith(answer)


def count_known(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> str:
    """Return for each task how many held-out items the base knows, in both languages."""
    counts = []
    for name, items in held_out_items().items():
        num_known = 0
        for language in LANGUAGES:
            wordings = TASKS[name].wordings[language]
            form = TEXTS["forms"][language][0]
            for item in items:
                values = item.values(language)
                num_known += is_known(model, tokenizer, wordings, values, form)
        counts.append(f"{name} {num_known}/{len(items) * len(LANGUAGES)}")
    return ", ".join(counts)


def main() -> None:
    write_data_files()
    if "--rows" in sys.argv[1:]:
        return
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters", flush=True)
    pretrain(model, tokenizer)
    model.to(torch.bfloat16).save_pretrained(DATA / "tiny-qwen2")
    tokenizer.save_pretrained(DATA / "tiny-qwen2")


if __name__ == "__main__":
    main()
