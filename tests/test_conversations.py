"""What a record says: the messages of every format, and what is refused with which reason."""

import pytest

from sft.conversations import RecordError, find_ignored_keys, parse_json, parse_record

DEFAULT = " default system prompt\n"  # kept as it is
Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
CONTEXT = {"role": "assistant", "content": "a", "weight": 0}
HUMAN = {"from": "human", "value": "q"}
GPT = {"from": "gpt", "value": "a"}


def case(name: str, *values):
    return pytest.param(*values, id=name)


# ---- What is taken ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "record",
    [
        case("query and answer", {"query": "q", "answer": "a"}),
        case("query and response", {"query": "q", "response": "a"}),
        case("question and answer", {"question": "q", "answer": "a"}),
        case("alpaca", {"instruction": "q", "output": "a"}),
        case("alpaca with empty keys", {"instruction": "q", "input": "", "output": "a"}),
        case("input and output", {"input": "q", "output": "a"}),
        case("instruction and response", {"instruction": "q", "response": "a"}),
        case("prompt and completion", {"prompt": "q", "completion": "a"}),
        case("trl's lists", {"prompt": [Q], "completion": [A]}),
        case("messages", {"messages": [Q, A]}),
        case("sharegpt", {"conversations": [HUMAN, GPT]}),
        case("sharegpt with user", {"conversations": [{"from": "user", "value": "q"}, GPT]}),
        case("conversations with roles", {"conversations": [Q, A]}),
        case("null is no key", {"query": "q", "answer": "a", "tools": None, "messages": None}),
        case("empty is no key", {"query": "q", "answer": "a", "tools": [], "history": [], "x": ""}),
        case("turns with nulls", {"messages": [{**Q, "name": None, "weight": None}, A]}),
        case("part lists", {"messages": [{**Q, "content": [{"type": "text", "text": "q"}]}, A]}),
    ],
)
def test_a_question_and_an_answer_in_any_format(record):
    system = {"role": "system", "content": DEFAULT}
    assert parse_record(record, DEFAULT) == [system, Q, A]


def test_the_parts_of_a_content_list_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = parse_record({"messages": [{"role": "user", "content": parts}, A]}, DEFAULT)
    assert messages[1]["content"] == "one two"


def test_input_follows_the_instruction():
    record = {"instruction": "Translate:", "input": "cat", "output": "Katze"}
    assert parse_record(record, DEFAULT)[1]["content"] == "Translate:\ncat"


def test_history_comes_before_the_question_and_is_trained():
    record = {"instruction": "q", "output": "a", "history": [["q0", "a0"], ["q1", "a1"]]}
    messages = parse_record(record, DEFAULT)
    assert [message["content"] for message in messages[1:]] == ["q0", "a0", "q1", "a1", "q", "a"]
    assert not any("weight" in message for message in messages)


def test_of_trls_lists_only_the_completion_is_trained():
    for answer in (A, {**A, "weight": 1}):
        messages = parse_record({"prompt": [S, Q, answer, Q], "completion": [A]}, DEFAULT)
        assert messages == [S, Q, CONTEXT, Q, A]


def test_several_turns_in_their_order():
    turns = []
    for text in ["one", "two", "three"]:
        turns.append({"role": "user", "content": f"q {text}"})
        turns.append({"role": "assistant", "content": f"a {text}"})
    assert parse_record({"messages": turns}, DEFAULT)[1:] == turns


def test_texts_stay_as_they_are():
    text = "\n\u2028 <|im_end|> 🚀\r\n\ttext \n"
    messages = parse_record({"query": text, "answer": text, "system": text}, DEFAULT)
    assert [message["content"] for message in messages] == [text, text, text]


# ---- The system text ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "record",
    [
        case("beside a question", {"system": "s", "query": "q", "answer": "a"}),
        case("beside messages", {"system": "s", "messages": [Q, A]}),
        case("beside sharegpt", {"system": "s", "conversations": [HUMAN, GPT]}),
        case("alpaca's", {"system": "s", "instruction": "q", "output": "a"}),
        case("first turn", {"messages": [S, Q, A]}),
        case("sharegpt turn", {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}),
        case("in a prompt list", {"prompt": [S, Q], "completion": [A]}),
        case("beside an empty turn", {"system": "s", "messages": [{**S, "content": ""}, Q, A]}),
    ],
)
def test_a_records_own_system_text_is_taken(record):
    assert parse_record(record, DEFAULT)[0] == S


@pytest.mark.parametrize(
    "record",
    [
        case("none", {"query": "q", "answer": "a"}),
        case("null", {"system": None, "query": "q", "answer": "a"}),
        case("empty", {"system": "", "query": "q", "answer": "a"}),
        case("empty beside messages", {"system": "", "messages": [Q, A]}),
        case("empty turn", {"messages": [{"role": "system", "content": ""}, Q, A]}),
        case("turn of null", {"messages": [{"role": "system", "content": None}, Q, A]}),
        case(
            "empty sharegpt turn", {"conversations": [{"from": "system", "value": ""}, HUMAN, GPT]}
        ),
    ],
)
def test_an_empty_system_text_is_none_in_every_format(record):
    assert parse_record(record, DEFAULT)[0] == {"role": "system", "content": DEFAULT}


# ---- Which answers are trained ------------------------------------------------------------------
@pytest.mark.parametrize("value", [0, False])
@pytest.mark.parametrize("key", ["weight", "loss", "loss_mask", "train", "trainable", "training"])
def test_an_answer_of_weight_0_is_context_under_every_name(key, value):
    messages = parse_record({"messages": [Q, {**A, key: value}, Q, A]}, DEFAULT)
    assert messages[1:] == [Q, CONTEXT, Q, A]


@pytest.mark.parametrize("value", [1, True, 1.0])
@pytest.mark.parametrize("key", ["weight", "loss", "loss_mask", "train", "trainable", "training"])
def test_an_answer_of_weight_1_is_trained(key, value):
    assert parse_record({"messages": [Q, {**A, key: value}]}, DEFAULT)[1:] == [Q, A]


def test_a_question_may_say_that_it_is_not_trained():
    messages = parse_record({"messages": [{**Q, "train": False}, {**A, "train": True}]}, DEFAULT)
    assert messages[1:] == [Q, A]


def test_train_on_last_makes_context_of_all_other_answers():
    messages = parse_record({"messages": [Q, A, Q, A, Q, A]}, DEFAULT, train_on="last")
    assert messages[1:] == [Q, CONTEXT, Q, CONTEXT, Q, A]


def test_train_on_last_leaves_a_single_answer_trained():
    assert parse_record({"query": "q", "answer": "a"}, DEFAULT, train_on="last")[1:] == [Q, A]


def test_train_on_last_refuses_a_record_whose_last_answer_is_context():
    with pytest.raises(RecordError, match="nothing to train"):
        parse_record({"messages": [Q, A, Q, CONTEXT]}, DEFAULT, train_on="last")


# ---- What is refused ----------------------------------------------------------------------------
NO_QUESTION = 'wants "query" and "answer", or "messages"'
ALTERNATE = "user and assistant alternate, assistant last"
ONLY_ONE = "only one of them can be meant"
REFUSED = [
    # Not a conversation
    case("a list", ["q", "a"], "is not a JSON object"),
    case("a text", "q", "is not a JSON object"),
    case("null", None, "is not a JSON object"),
    case("nothing", {}, NO_QUESTION),
    case("no question", {"answer": "a"}, NO_QUESTION),
    case("no answer", {"query": "q"}, NO_QUESTION),
    case("null answer", {"query": "q", "answer": None}, 'has an empty "answer"'),
    case("empty question", {"query": "", "answer": "a"}, 'has an empty "query"'),
    case("capitals", {"Query": "q", "Answer": "a"}, "write the keys in small letters"),
    case("blank answer", {"query": "q", "answer": " \n\t\u3000"}, "has an empty assistant text"),
    case("number", {"query": "q", "answer": 42}, 'its "answer" is not a string'),
    case("object", {"query": {"a": 1}, "answer": "a"}, 'its "query" is not a string'),
    case("number in input", {"instruction": "q", "input": 5, "output": "a"}, '"input" is not a'),
    case("number as system", {"system": 1, "query": "q", "answer": "a"}, "system text is not a"),
    case("NUL", {"query": "q", "answer": "a\0b"}, "NUL or half a surrogate pair"),
    case("half a pair", {"query": "q", "answer": "\ud83d"}, "NUL or half a surrogate pair"),
    case("half a pair in system", {"system": "\udc00", "messages": [Q, A]}, "half a surrogate"),
    # Turns
    case("no turns", {"messages": []}, NO_QUESTION),
    case("messages as text", {"messages": "q"}, 'has "messages" that is not a list'),
    case("turns as texts", {"messages": ["q", "a"]}, "has a turn that is not"),
    case("no role", {"messages": [{"content": "q"}, A]}, 'has a turn without a "role"'),
    case("no content", {"messages": [{"role": "user"}, A]}, "has an empty user text"),
    case("content as number", {"messages": [{**Q, "content": 5}, A]}, "user text is not a string"),
    case("tool turn", {"messages": [Q, {"role": "tool", "content": "t"}, A]}, "the role 'tool'"),
    case("role as list", {"messages": [{"role": ["user"], "content": "q"}, A]}, "the role"),
    case("two roles", {"messages": [{**Q, "from": "human"}, A]}, ONLY_ONE),
    case("two texts", {"messages": [{**Q, "value": "q"}, A]}, ONLY_ONE),
    case("answer first", {"messages": [A, Q]}, ALTERNATE),
    case("question last", {"messages": [Q, A, Q]}, ALTERNATE),
    case("two questions", {"messages": [Q, Q, A]}, ALTERNATE),
    case("system later", {"messages": [Q, S, A]}, ALTERNATE),
    case("system alone", {"messages": [S]}, ALTERNATE),
    case("sharegpt begins with gpt", {"conversations": [GPT, HUMAN, GPT]}, ALTERNATE),
    case("prompt list, text", {"prompt": [Q], "completion": "a"}, 'has "completion" that is not'),
    case("text, answer list", {"prompt": "q", "completion": [A]}, 'its "completion" is not a'),
    case("image part", {"messages": [{**Q, "content": [{"type": "image"}]}, A]}, "type 'image'"),
    case("part as text", {"messages": [{**Q, "content": ["q"]}, A]}, "user text is not a string"),
    case("part without text", {"messages": [{**Q, "content": [{"type": "text"}]}, A]}, "not a st"),
    case("history as text", {"query": "q", "answer": "a", "history": "q0"}, '"history" that is'),
    case("history as number", {"query": "q", "answer": "a", "history": 5}, '"history" that is'),
    case("history of one", {"query": "q", "answer": "a", "history": [["q0"]]}, '"history" that is'),
    case("history of numbers", {"query": "q", "answer": "a", "history": [[1, 2]]}, "not a string"),
    # Two of a kind
    case("query and prompt", {"query": "q", "prompt": "q", "answer": "a"}, ONLY_ONE),
    case("answer and output", {"query": "q", "answer": "a", "output": "b"}, ONLY_ONE),
    case("messages and query", {"messages": [Q, A], "query": "q"}, ONLY_ONE),
    case("messages and history", {"messages": [Q, A], "history": [["q", "a"]]}, ONLY_ONE),
    case("messages twice", {"messages": [Q, A], "conversations": [HUMAN, GPT]}, ONLY_ONE),
    case("query and input", {"query": "q", "input": "i", "answer": "a"}, ONLY_ONE),
    case("two systems", {"messages": [S, Q, A], "system": "s"}, ONLY_ONE),
    case(
        "prompt list and history", {"prompt": [Q], "completion": [A], "history": [["q", "a"]]}, ""
    ),
    # What is not done here
    case("tools", {"messages": [Q, A], "tools": [{"name": "f"}]}, '"tools": tool calls are not'),
    case("tool calls", {"messages": [Q, {**A, "tool_calls": [{}]}]}, '"tool_calls": tool calls'),
    case("reasoning", {"messages": [Q, {**A, "reasoning_content": "hm"}]}, '"reasoning_content"'),
    case("name", {"messages": [{**Q, "name": "Bob"}, A]}, '"name": Qwen2\'s format has no names'),
    case("images", {"query": "q", "answer": "a", "images": ["x.png"]}, '"images": only text'),
    case("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, '"chosen": preference'),
    case("context", {"question": "q", "context": "c", "answer": "a"}, '"context": write it into'),
    case(
        "openorca's", {"system_prompt": "s", "question": "q", "response": "a"}, 'name it "system"'
    ),
    case("weight of a record", {"query": "q", "answer": "a", "weight": 0}, "to an assistant turn"),
    case("flag of a record", {"query": "q", "answer": "a", "train": False}, "to an assistant turn"),
    # Weights
    case("nothing trained", {"messages": [Q, {**A, "weight": 0}]}, "has nothing to train"),
    case("half a weight", {"messages": [Q, {**A, "weight": 0.5}]}, "that is not 0 or 1"),
    case("weight as text", {"messages": [Q, {**A, "weight": "0"}]}, "that is not 0 or 1"),
    case("two weights", {"messages": [Q, {**A, "weight": 1, "loss": False}]}, "two weights that"),
    case("trained question", {"messages": [{**Q, "loss": True}, A]}, "its user turn has a weight"),
    case("parts of a turn", {"messages": [Q, {**A, "train_detail": [1]}]}, '"train_detail"'),
]


@pytest.mark.parametrize(("record", "reason"), REFUSED)
def test_what_cannot_be_trained_is_refused(record, reason):
    with pytest.raises(RecordError) as error:
        parse_record(record, DEFAULT)
    assert reason in str(error.value)


@pytest.mark.parametrize(("record", "reason"), REFUSED)
def test_a_reason_is_one_short_line(record, reason):
    with pytest.raises(RecordError) as error:
        parse_record(record, DEFAULT)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_a_key_of_another_language_is_shown_and_one_that_is_long_is_cut():
    with pytest.raises(RecordError) as error:
        parse_record({"问题": "q", "k" * 1000: "a"}, DEFAULT)
    assert "问题" in str(error.value)
    assert len(str(error.value)) < 300


# ---- What has no effect -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("record", "keys"),
    [
        case("none", {"query": "q", "answer": "a", "system": "s"}, []),
        case(
            "of the record", {"query": "q", "answer": "a", "score": 0.5, "id": 7}, ["id", "score"]
        ),
        case(
            "of a turn",
            {"messages": [{**Q, "time": 1}, {**A, "weight": 1, "at": 2}]},
            ["at", "time"],
        ),
        case("of a list", {"prompt": [{**Q, "time": 1}], "completion": [A]}, ["time"]),
        case(
            "of sharegpt",
            {"conversations": [HUMAN, {**GPT, "model": "x"}], "id": 1},
            ["id", "model"],
        ),
        case("empty ones", {"query": "q", "answer": "a", "x": "", "tools": []}, []),
        case("another spelling", {"query": "q", "answer": "a", "System": "s"}, ["System"]),
    ],
)
def test_keys_without_effect_are_named(record, keys):
    assert find_ignored_keys(record) == keys


# ---- JSON ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        case("cut", '{"query": "q", "answer": ', "is broken JSON: Expecting value at character 26"),
        case("open text", '{"query": "q', "is broken JSON: Unterminated string starting"),
        case("a word", "query", "is broken JSON"),
        case("two values", '{"query": "q"} {"query": "q"}', "is broken JSON: Extra data"),
        case("deep", "[" * 200_000 + "]" * 200_000, "is broken JSON"),
        case("a long number", "9" * 10_000, "is broken JSON"),
        case("a key twice", '{"query": "q", "query": "r"}', "has a key that appears twice"),
        case("a key twice in a turn", '{"messages": [{"role": 1, "role": 2}]}', "appears twice"),
    ],
)
def test_broken_json_is_refused(text, reason):
    with pytest.raises(RecordError) as error:
        parse_json(text)
    assert reason in str(error.value)


def test_json_is_read():
    assert parse_json('{"query": "\\u95ee\\u2028", "n": [1, null]}') == {
        "query": "问\u2028",
        "n": [1, None],
    }
