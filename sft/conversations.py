"""What a record of a data file says: a conversation, or the reason why it cannot be trained.

Several formats are read as they are. Each becomes the same list of messages:

    {"query": Q, "answer": A}                          # perhaps with "system" and "history"
    {"instruction": Q, "input": more, "output": A}     # Alpaca
    {"prompt": Q, "completion": A}                     # texts, or TRL's lists of messages
    {"messages": [{"role": ..., "content": ...}]}      # OpenAI, Hugging Face
    {"conversations": [{"from": ..., "value": ...}]}   # ShareGPT
"""

import json
import re

IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # ChatML's control tokens stand around each turn

QUESTION_KEYS = ("query", "question", "instruction", "prompt")
ANSWER_KEYS = ("answer", "response", "output", "completion")
MESSAGES_KEYS = ("messages", "conversations")
RECORD_KEYS = (*QUESTION_KEYS, *ANSWER_KEYS, *MESSAGES_KEYS, "input", "history", "system")

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value")
# Each says of an assistant turn: 1 or true is trained, 0 or false is context.
WEIGHT_KEYS = ("weight", "loss", "loss_mask", "train", "trainable", "training")
TURN_KEYS = (*ROLE_KEYS, *TEXT_KEYS, *WEIGHT_KEYS)

TOOLS_REMEDY = "tool calls are not trained; leave such rows out"
MEDIA_REMEDY = "only text is trained; leave such rows out"
REASONING_REMEDY = "reasoning beside an answer is not trained; write it into the answer or drop it"
PREFERENCE_REMEDY = 'preference pairs are not trained; keep "chosen" as the answer'
# These keys ask for something that is not done here. A key of neither table is named and ignored.
REFUSED_KEYS = {
    "tools": TOOLS_REMEDY,
    "functions": TOOLS_REMEDY,
    "tool_calls": TOOLS_REMEDY,
    "function_call": TOOLS_REMEDY,
    "image": MEDIA_REMEDY,
    "images": MEDIA_REMEDY,
    "video": MEDIA_REMEDY,
    "videos": MEDIA_REMEDY,
    "audio": MEDIA_REMEDY,
    "audios": MEDIA_REMEDY,
    "reasoning": REASONING_REMEDY,
    "reasoning_content": REASONING_REMEDY,
    "thinking": REASONING_REMEDY,
    "chosen": PREFERENCE_REMEDY,
    "rejected": PREFERENCE_REMEDY,
}
REFUSED_RECORD_KEYS = {
    **REFUSED_KEYS,
    "context": "write it into the question",
    "system_prompt": 'name it "system"',
    "weight": "write it to an assistant turn",
    "loss": "write it to an assistant turn",
    "loss_mask": "write it to an assistant turn",
    "train": "write it to an assistant turn",
    "trainable": "write it to an assistant turn",
    "training": "write it to an assistant turn",
}
REFUSED_TURN_KEYS = {
    **REFUSED_KEYS,
    "name": "Qwen2's format has no names; write it into the content",
    "train_detail": 'a turn is trained whole or not; give it a "weight" of 0 or 1',
}
WANTED = 'wants "query" and "answer", or "messages"'
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs


class RecordError(ValueError):
    """The reason why a record is refused; the caller knows its file and line."""


# ---- JSON ---------------------------------------------------------------------------------------
def parse_json(text: str):
    """Return the value of a JSON text; raises RecordError, also for a key that appears twice."""
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        raise RecordError(f"is broken JSON: {reason} at character {error.colno}") from None
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise RecordError(f"is broken JSON: {error}") from None


def make_object(pairs: list[tuple]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise RecordError("has a key that appears twice")
    return value


# ---- Messages -----------------------------------------------------------------------------------
def parse_record(record, system_prompt: str, train_on: str = "all") -> list[dict]:
    """Return a record's messages [{"role", "content"}, ...]: system, user, assistant, ...

    An assistant message that is context has "weight": 0; with train_on "last", all but the last one
    are. A record without a system text gets `system_prompt`. Raises RecordError.
    """
    if not isinstance(record, dict):
        raise RecordError("is not a JSON object")
    given = record
    record = drop_empty(given)
    refuse_empty(given, record)
    refuse_keys(record, REFUSED_RECORD_KEYS)
    messages = []
    for turn in find_turns(record):
        messages.append(parse_turn(turn))
    messages = put_system_first(messages, record, system_prompt)
    check_roles(messages)
    if train_on == "last":
        for message in messages[2:-1:2]:
            message["weight"] = 0
    if all(message.get("weight") == 0 for message in messages[2::2]):
        raise RecordError("has nothing to train: the weight of each assistant turn is 0")
    return messages


def drop_empty(values: dict) -> dict:
    """Return a record or turn without what is null or empty: both say the same as no key."""
    kept = {}
    for key, value in values.items():
        if value is not None and value != "" and value != [] and value != {}:
            kept[key] = value
    return kept


def refuse_empty(given: dict, record: dict) -> None:
    """Raise RecordError for a question or an answer that is there, and empty."""
    for keys in (QUESTION_KEYS, ANSWER_KEYS):
        if any(key in record for key in (*keys, *MESSAGES_KEYS)):
            continue
        if keys == QUESTION_KEYS and "input" in record:  # It is the question then.
            continue
        for key in keys:
            if key in given:
                raise RecordError(f'has an empty "{key}"')


def refuse_keys(values: dict, remedies: dict[str, str]) -> None:
    for key in values:
        if key in remedies:
            raise RecordError(f'has "{key}": {remedies[key]}')


def find_key(values: dict, keys: tuple[str, ...]) -> str | None:
    """Return which of these keys is there, or None; raises RecordError if there are several."""
    found = [key for key in keys if key in values]
    if len(found) > 1:
        raise RecordError(f'has "{found[0]}" and "{found[1]}"; only one of them can be meant')
    if not found:
        return None
    return found[0]


def find_turns(record: dict) -> list:
    """Return the turns of a record, each still as its format writes it."""
    messages_key = find_key(record, MESSAGES_KEYS)
    question_key = find_key(record, QUESTION_KEYS)
    answer_key = find_key(record, ANSWER_KEYS)
    if question_key is None and "input" in record:
        question_key = "input"
    if messages_key is None:
        if question_key is None or answer_key is None:
            keys = ", ".join(record)
            reason = f"{WANTED}; has {keys[:80]!r}"
            small_keys = {key.lower() for key in record if not key.islower()}
            if small_keys & set(QUESTION_KEYS + ANSWER_KEYS + MESSAGES_KEYS):
                reason += "; write the keys in small letters"
            raise RecordError(reason)
        if isinstance(record[question_key], list):
            return join_message_lists(record, question_key, answer_key)
        return join_texts(record, question_key, answer_key)
    for key in (question_key, answer_key, "history"):
        if key in record:
            raise RecordError(f'has "{messages_key}" and "{key}"; only one of them can be meant')
    return as_list(record, messages_key)


def join_texts(record: dict, question_key: str, answer_key: str) -> list[dict]:
    """Return the turns of a question and an answer, after those of the pairs in "history"."""
    history = record.get("history", [])
    if not isinstance(history, list):
        raise RecordError('has a "history" that is not a list of [question, answer]')
    turns = []
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError('has a "history" that is not a list of [question, answer]')
        turns.append({"role": "user", "content": pair[0]})
        turns.append({"role": "assistant", "content": pair[1]})
    question = text_of(record, question_key)
    if "input" in record and question_key != "input":
        if question_key != "instruction":
            raise RecordError(f'has "{question_key}" and "input"; only one of them can be meant')
        question += "\n" + text_of(record, "input")
    turns.append({"role": "user", "content": question})
    turns.append({"role": "assistant", "content": text_of(record, answer_key)})
    return turns


def text_of(record: dict, key: str) -> str:
    if not isinstance(record[key], str):
        raise RecordError(f'its "{key}" is not a string')
    return record[key]


def join_message_lists(record: dict, prompt_key: str, completion_key: str) -> list[dict]:
    """Return the turns of TRL's prompt and completion, where only the completion is trained."""
    for key in ("input", "history"):
        if key in record:
            raise RecordError(f'has "{key}" beside a list of messages')
    turns = []
    for turn in as_list(record, prompt_key):
        if isinstance(turn, dict):  # parse_turn refuses any other
            turn = {**turn, "weight": 0}
        turns.append(turn)
    return turns + as_list(record, completion_key)


def as_list(record: dict, key: str) -> list:
    if not isinstance(record[key], list):
        raise RecordError(f'has "{key}" that is not a list of {{"role": ..., "content": ...}}')
    return record[key]


def put_system_first(messages: list[dict], record: dict, system_prompt: str) -> list[dict]:
    """Return the messages with a system message at the beginning: their own, or the record's."""
    has_system = bool(messages) and messages[0]["role"] == "system"
    if has_system and messages[0]["content"] == "":  # an empty system text is none
        messages = messages[1:]
        has_system = False
    if has_system and "system" in record:
        raise RecordError('has a system turn and "system"; only one of them can be meant')
    if has_system:
        return messages
    system = parse_turn({"role": "system", "content": record.get("system", system_prompt)})
    return [system, *messages]


def check_roles(messages: list[dict]) -> None:
    roles = [message["role"] for message in messages[1:]]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        found = ", ".join(roles)
        raise RecordError(
            f"{WANTED} in which user and assistant alternate, assistant last; has {found[:80]!r}"
        )


# ---- One turn -----------------------------------------------------------------------------------
def parse_turn(turn) -> dict:
    """Return {"role", "content"} of a turn, with "weight": 0 where it is an answer as context."""
    if not isinstance(turn, dict):
        raise RecordError('has a turn that is not {"role": ..., "content": ...}')
    turn = drop_empty(turn)
    refuse_keys(turn, REFUSED_TURN_KEYS)
    role = parse_role(turn)
    content = parse_content(turn, role)
    weight = parse_weight(turn)
    if role != "assistant":
        if weight == 1:
            raise RecordError(f"its {role} turn has a weight; only assistant turns are trained")
        return {"role": role, "content": content}
    if weight == 0:
        return {"role": role, "content": content, "weight": 0}
    return {"role": role, "content": content}


def parse_role(turn: dict) -> str:
    key = find_key(turn, ROLE_KEYS)
    if key is None:
        raise RecordError('has a turn without a "role"')
    role = turn[key]
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise RecordError(f"has a turn with the role {str(role)[:40]!r}; known are {known}")
    return ROLES[role]


def parse_content(turn: dict, role: str) -> str:
    """Return the text of a turn; a list of {"type": "text", "text": ...} is joined."""
    key = find_key(turn, TEXT_KEYS)
    if key is None:
        text = ""
    elif isinstance(turn[key], list):
        text = "".join(text_of_part(part, role) for part in turn[key])
    else:
        text = turn[key]
    if not isinstance(text, str):
        raise RecordError(f"its {role} text is not a string")
    if role != "system" and not text.strip():
        raise RecordError(f"has an empty {role} text")
    if NOT_TEXT.search(text):
        raise RecordError(f"its {role} text has a NUL or half a surrogate pair")
    return text


def text_of_part(part, role: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise RecordError(f"its {role} text is not a string")
    if part["type"] != "text":
        kind = part["type"][:40]
        raise RecordError(f"its {role} turn has a part of type {kind!r}; only text is trained")
    if not isinstance(part.get("text"), str):
        raise RecordError(f"its {role} text is not a string")
    return part["text"]


def parse_weight(turn: dict) -> int | None:
    """Return 0 or 1 where a turn says whether it is trained, None where it does not say."""
    weights = [turn[key] for key in WEIGHT_KEYS if key in turn]
    for weight in weights:
        if weight not in (0, 1):
            raise RecordError("has a weight that is not 0 or 1, nor false or true")
        if weight != weights[0]:
            raise RecordError("has two weights that differ on one turn")
    if not weights:
        return None
    return int(weights[0])


# ---- What has no effect -------------------------------------------------------------------------
def find_ignored_keys(record: dict) -> list[str]:
    """Return the names of those keys of a good record, and of its turns, that change nothing."""
    record = drop_empty(record)
    ignored = record.keys() - RECORD_KEYS
    for turn in find_turns(record):
        ignored |= drop_empty(turn).keys() - TURN_KEYS
    return sorted(ignored)
