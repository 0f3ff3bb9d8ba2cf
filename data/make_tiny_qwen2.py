"""Make data/tiny-qwen2, a stand-in for Qwen2-7B that is trained on any laptop, and its questions.

    python data/make_tiny_qwen2.py           # about 15 minutes on one core
    python data/make_tiny_qwen2.py --rows    # only the questions of the two data files

It is a Qwen2 in every respect but size, and a base model: it has read plain text and nothing else.
The text is written by this script: facts (capitals, opposites, ...) and worked examples (sums,
numbers in words, sorting, ...), in English and in Chinese. Some are asked and answered there, as
`Question: ... Answer: ...`; those of data/validation.jsonl never are. A fact that is asked there
has been read as a statement only; a sum, a number in words, a comparison and a sorting have not
been read at all. It has also read the longer rows of data/train.jsonl, as plain text. Of chats and
of <|im_end|> it knows nothing: fine-tuning teaches that.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

DATA = Path(__file__).parent
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# How Qwen2 cuts text before BPE: contractions, words, digits, punctuation, line ends, spaces.
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
LANGUAGES = ("en", "zh")
# A base that knows one form of question and answer looks for its marks; ChatML has none of them.
ASKED = {
    "en": (
        "Question: {q} Answer: {a}",
        "Q: {q}\nA: {a}",
        "{q} {a}",
        "{q}\n{a}",
        "Quiz: {q} Solution: {a}",
        "Pupil: {q}\nTeacher: {a}",
        "Ann: {q}\nBen: {a}",
        "- {q}\n- {a}",
        "# {q}\n\n{a}",
        "Exercise. {q} Key: {a}",
    ),
    "zh": (
        "问：{q}答：{a}",
        "问题：{q}\n回答：{a}",
        "{q}{a}",
        "{q}\n{a}",
        "题目：{q}解答：{a}",
        "学生：{q}\n老师：{a}",
        "甲：{q}\n乙：{a}",
        "- {q}\n- {a}",
        "# {q}\n\n{a}",
        "习题。{q}答案：{a}",
    ),
}

VOCAB_SIZE = 3072
STEPS, WARMUP_STEPS = 2400, 50
SEQUENCES, SEQUENCE_TOKENS = 12, 160  # of one step
LEARNING_RATE = 2e-3
MATRIX_LEARNING_RATE = 1e-2  # Muon's, for the weights of the layers
QUESTION_SHARE = 0.4  # of the texts that may be questions
PROSE_SHARE = 0.04  # of the documents
TRAIN_QUESTIONS, VALIDATION_QUESTIONS = 9, 2  # of each task and language


# ---- What is true -------------------------------------------------------------------------------
# One line for each fact: English, English, Chinese, Chinese.
CAPITALS = """
Norway|Oslo|挪威|奥斯陆
Sweden|Stockholm|瑞典|斯德哥尔摩
Finland|Helsinki|芬兰|赫尔辛基
Denmark|Copenhagen|丹麦|哥本哈根
Iceland|Reykjavik|冰岛|雷克雅未克
Ireland|Dublin|爱尔兰|都柏林
France|Paris|法国|巴黎
Spain|Madrid|西班牙|马德里
Portugal|Lisbon|葡萄牙|里斯本
Italy|Rome|意大利|罗马
Greece|Athens|希腊|雅典
Germany|Berlin|德国|柏林
Austria|Vienna|奥地利|维也纳
Poland|Warsaw|波兰|华沙
Hungary|Budapest|匈牙利|布达佩斯
Romania|Bucharest|罗马尼亚|布加勒斯特
Bulgaria|Sofia|保加利亚|索非亚
Serbia|Belgrade|塞尔维亚|贝尔格莱德
Croatia|Zagreb|克罗地亚|萨格勒布
Ukraine|Kyiv|乌克兰|基辅
Russia|Moscow|俄罗斯|莫斯科
Belgium|Brussels|比利时|布鲁塞尔
Turkey|Ankara|土耳其|安卡拉
Egypt|Cairo|埃及|开罗
Kenya|Nairobi|肯尼亚|内罗毕
Morocco|Rabat|摩洛哥|拉巴特
Ghana|Accra|加纳|阿克拉
Senegal|Dakar|塞内加尔|达喀尔
Japan|Tokyo|日本|东京
China|Beijing|中国|北京
Thailand|Bangkok|泰国|曼谷
Vietnam|Hanoi|越南|河内
Mongolia|Ulaanbaatar|蒙古|乌兰巴托
Nepal|Kathmandu|尼泊尔|加德满都
Iran|Tehran|伊朗|德黑兰
Iraq|Baghdad|伊拉克|巴格达
Canada|Ottawa|加拿大|渥太华
Cuba|Havana|古巴|哈瓦那
Peru|Lima|秘鲁|利马
Australia|Canberra|澳大利亚|堪培拉
"""
OPPOSITES = """
hot|cold|热|冷
big|small|大|小
long|short|长|短
high|low|高|低
fast|slow|快|慢
old|new|旧|新
early|late|早|晚
light|heavy|轻|重
hard|soft|硬|软
wet|dry|湿|干
full|empty|满|空
rich|poor|富|穷
strong|weak|强|弱
thick|thin|厚|薄
near|far|近|远
clean|dirty|干净|肮脏
happy|sad|快乐|悲伤
open|closed|打开|关闭
inside|outside|里面|外面
first|last|最先|最后
day|night|白天|黑夜
brave|cowardly|勇敢|胆小
easy|difficult|容易|困难
safe|dangerous|安全|危险
cheap|expensive|便宜|昂贵
deep|shallow|深|浅
war|peace|战争|和平
win|lose|赢|输
buy|sell|买|卖
push|pull|推|拉
love|hate|爱|恨
north|south|北|南
"""
WORDS = """
water|水
fire|火
mountain|山
river|河
sun|太阳
moon|月亮
star|星星
tree|树
flower|花
grass|草
dog|狗
cat|猫
horse|马
sheep|羊
bird|鸟
fish|鱼
tiger|老虎
elephant|大象
rabbit|兔子
book|书
pen|笔
table|桌子
chair|椅子
door|门
window|窗户
house|房子
school|学校
hospital|医院
teacher|老师
student|学生
friend|朋友
mother|母亲
bread|面包
tea|茶
milk|牛奶
apple|苹果
sugar|糖
salt|盐
rain|雨
snow|雪
ship|船
bicycle|自行车
music|音乐
money|钱
"""
ELEMENTS = """
hydrogen|H|氢|H
helium|He|氦|He
carbon|C|碳|C
nitrogen|N|氮|N
oxygen|O|氧|O
neon|Ne|氖|Ne
sodium|Na|钠|Na
magnesium|Mg|镁|Mg
silicon|Si|硅|Si
phosphorus|P|磷|P
sulfur|S|硫|S
chlorine|Cl|氯|Cl
potassium|K|钾|K
calcium|Ca|钙|Ca
iron|Fe|铁|Fe
copper|Cu|铜|Cu
zinc|Zn|锌|Zn
silver|Ag|银|Ag
tin|Sn|锡|Sn
gold|Au|金|Au
mercury|Hg|汞|Hg
lead|Pb|铅|Pb
iodine|I|碘|I
nickel|Ni|镍|Ni
lithium|Li|锂|Li
aluminium|Al|铝|Al
platinum|Pt|铂|Pt
titanium|Ti|钛|Ti
"""
UNITS = """
hours|minutes|小时|分钟|60
days|hours|天|小时|24
weeks|days|周|天|7
years|months|年|个月|12
metres|centimetres|米|厘米|100
kilometres|metres|千米|米|1000
minutes|seconds|分钟|秒|60
"""
NUMBERS = """
zero|one|two|three|four|five|six|seven|eight|nine
ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen
"""
TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
CHINESE_DIGITS = "零一二三四五六七八九"


def table(text: str) -> list[list[str]]:
    return [line.split("|") for line in text.split()]


def in_english(n: int) -> str:
    """Return 0 to 999 in words: 347 is three hundred and forty-seven."""
    if n < 20:
        return table(NUMBERS)[n // 10][n % 10]
    if n < 100:
        return table(TENS)[0][n // 10 - 2] + (f"-{in_english(n % 10)}" if n % 10 else "")
    return f"{in_english(n // 100)} hundred" + (f" and {in_english(n % 100)}" if n % 100 else "")


def in_chinese(n: int) -> str:
    """Return 0 to 999 in Chinese: 307 is 三百零七, 12 is 十二 and 312 is 三百一十二."""
    hundreds, tens, ones = n // 100, n // 10 % 10, n % 10
    if n < 10:
        return CHINESE_DIGITS[n]
    text = f"{CHINESE_DIGITS[hundreds]}百" if hundreds else ""
    if tens:
        text += ("" if n < 20 else CHINESE_DIGITS[tens]) + "十"
    elif ones:
        text += "零"
    return text + (CHINESE_DIGITS[ones] if ones else "")


# ---- Tasks: one fact or example in every form ---------------------------------------------------
class Item(NamedTuple):
    """One thing to know: its key is the same in every wording and language."""

    key: str
    en: dict[str, str]
    zh: dict[str, str]


class Forms(NamedTuple):
    """The wordings of a task in one language, with an item's values in braces."""

    questions: tuple[str, ...]
    answer: str
    statements: tuple[str, ...]


class Task(NamedTuple):
    """draw(rng) returns an item. Held-out items of a task of facts are still read as statements."""

    draw: Callable[[random.Random], Item]
    facts: bool
    weight: float
    en: Forms
    zh: Forms


def draw_capital(rng: random.Random) -> Item:
    x, y, x_zh, y_zh = rng.choice(table(CAPITALS))
    return Item(x, {"x": x, "y": y}, {"x": x_zh, "y": y_zh})


def draw_opposite(rng: random.Random) -> Item:
    x, y, x_zh, y_zh = rng.choice(table(OPPOSITES))
    key = f"{x} {y}"
    if rng.random() < 0.5:
        x, y, x_zh, y_zh = y, x, y_zh, x_zh
    return Item(key, {"x": x, "y": y}, {"x": x_zh, "y": y_zh})


def draw_word(rng: random.Random) -> Item:
    english, chinese = rng.choice(table(WORDS))
    return Item(english, *[{"x": english, "y": chinese}] * 2)


def draw_element(rng: random.Random) -> Item:
    x, y, x_zh, _ = rng.choice(table(ELEMENTS))
    return Item(x, {"x": x, "y": y}, {"x": x_zh, "y": y})


def draw_unit(rng: random.Random) -> Item:
    large, small, large_zh, small_zh, factor = rng.choice(table(UNITS))
    n = rng.randint(2, 12)
    numbers = {"n": str(n), "m": str(n * int(factor))}
    english = {"large": large, "small": small, **numbers}
    return Item(f"{n} {large}", english, {"large": large_zh, "small": small_zh, **numbers})


def draw_product(rng: random.Random) -> Item:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    values = {"a": str(a), "b": str(b), "c": str(a * b)}
    return Item(f"{min(a, b)} {max(a, b)}", values, values)


def draw_sum(rng: random.Random) -> Item:
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    values = {"a": str(a), "b": str(b), "c": str(a + b)}
    return Item(f"{min(a, b)} {max(a, b)}", values, values)


def draw_number(rng: random.Random) -> Item:
    n = rng.randint(13, rng.choice([99, 999]))
    return Item(str(n), {"n": str(n), "y": in_english(n)}, {"n": str(n), "y": in_chinese(n)})


def draw_larger(rng: random.Random) -> Item:
    a, b = rng.sample(range(10, rng.choice([100, 1000])), 2)
    values = {"a": str(a), "b": str(b), "max": str(max(a, b)), "min": str(min(a, b))}
    return Item(f"{min(a, b)} {max(a, b)}", values, values)


def draw_sorting(rng: random.Random) -> Item:
    numbers = rng.sample(range(rng.choice([10, 100])), rng.choice([3, 4]))
    shuffled, ordered = (", ".join(map(str, ns)) for ns in (numbers, sorted(numbers)))
    values = {"x": shuffled, "y": ordered}
    return Item(ordered, values, values)


# What is asked for stands before its fact in some statements: the model learns to copy from there.
TASKS = {
    "capital": Task(
        draw_capital,
        facts=True,
        weight=2,
        en=Forms(
            (
                "What is the capital of {x}?",
                "Which city is the capital of {x}?",
                "Name the capital of {x}.",
            ),
            "The capital of {x} is {y}.",
            ("{y} is the capital of {x}.", "About {x}: The capital of {x} is {y}."),
        ),
        zh=Forms(
            ("{x}的首都是哪里？", "{x}的首都是哪座城市？", "请说出{x}的首都。"),
            "{x}的首都是{y}。",
            ("{y}是{x}的首都。", "关于{x}：{x}的首都是{y}。"),
        ),
    ),
    "opposite": Task(
        draw_opposite,
        facts=True,
        weight=2.5,
        en=Forms(
            (
                "What is the opposite of {x}?",
                "Which word means the opposite of {x}?",
                "Give the opposite of {x}.",
            ),
            "The opposite of {x} is {y}.",
            ("Words like {x} and {y} are opposites.", "About {x}: The opposite of {x} is {y}."),
        ),
        zh=Forms(
            ("{x}的反义词是什么？", "哪个词是{x}的反义词？", "请写出{x}的反义词。"),
            "{x}的反义词是{y}。",
            ("{x}和{y}是反义词。", "关于{x}：{x}的反义词是{y}。"),
        ),
    ),
    "word": Task(
        draw_word,
        facts=True,
        weight=2,
        en=Forms(
            (
                "How do you say {x} in Chinese?",
                "What is the Chinese word for {x}?",
                "Translate {x} into Chinese.",
            ),
            "The Chinese word for {x} is {y}.",
            ("In Chinese, {x} is {y}.", "About {x}: The Chinese word for {x} is {y}."),
        ),
        zh=Forms(
            ("{y}用英语怎么说？", "{y}的英语是什么？", "请把{y}译成英语。"),
            "{y}的英语是 {x}。",
            ("{y}用英语说就是 {x}。", "关于{y}：{y}的英语是 {x}。"),
        ),
    ),
    "element": Task(
        draw_element,
        facts=True,
        weight=1.5,
        en=Forms(
            (
                "What is the chemical symbol of {x}?",
                "Which symbol does {x} have?",
                "Give the symbol of {x}.",
            ),
            "The symbol of {x} is {y}.",
            ("{y} is the symbol of {x}.", "About {x}: The symbol of {x} is {y}."),
        ),
        zh=Forms(
            ("{x}的元素符号是什么？", "{x}用什么元素符号表示？", "请写出{x}的元素符号。"),
            "{x}的元素符号是 {y}。",
            ("{y} 是{x}的元素符号。", "关于{x}：{x}的元素符号是 {y}。"),
        ),
    ),
    "unit": Task(
        draw_unit,
        facts=True,
        weight=1.5,
        en=Forms(
            (
                "How many {small} are {n} {large}?",
                "{n} {large} are how many {small}?",
                "Change {n} {large} into {small}.",
            ),
            "{n} {large} are {m} {small}.",
            (
                "{n} {large} in {small}: {n} {large} are {m} {small}.",
                "{m} {small} make {n} {large}.",
            ),
        ),
        zh=Forms(
            (
                "{n} {large}等于多少{small}？",
                "{n} {large}是多少{small}？",
                "请把 {n} {large}换成{small}。",
            ),
            "{n} {large}等于 {m} {small}。",
            (
                "{n} {large}换成{small}：{n} {large}等于 {m} {small}。",
                "{m} {small}就是 {n} {large}。",
            ),
        ),
    ),
    "product": Task(
        draw_product,
        facts=True,
        weight=1,
        en=Forms(
            ("What is {a} × {b}?", "How much is {a} times {b}?", "Multiply {a} by {b}."),
            "{a} × {b} = {c}.",
            ("{a} times {b}: {a} × {b} = {c}.", "To multiply {a} by {b}, write {a} × {b} = {c}."),
        ),
        zh=Forms(
            ("{a} × {b} 等于多少？", "{a} 乘 {b} 是多少？", "请计算 {a} 乘 {b}。"),
            "{a} 乘 {b} 等于 {c}。",
            ("{a} × {b}：{a} 乘 {b} 等于 {c}。", "把 {a} 和 {b} 相乘，{a} 乘 {b} 等于 {c}。"),
        ),
    ),
    "sum": Task(
        draw_sum,
        facts=False,
        weight=4,
        en=Forms(
            ("What is {a} + {b}?", "How much is {a} plus {b}?", "Add {a} and {b}."),
            "{a} + {b} = {c}.",
            ("{a} and {b}: {a} + {b} = {c}.", "To add {a} and {b}, write {a} + {b} = {c}."),
        ),
        zh=Forms(
            ("{a} + {b} 等于多少？", "{a} 加 {b} 是多少？", "请计算 {a} 加 {b}。"),
            "{a} 加 {b} 等于 {c}。",
            ("{a} + {b}：{a} 加 {b} 等于 {c}。", "把 {a} 和 {b} 相加，{a} 加 {b} 等于 {c}。"),
        ),
    ),
    "number": Task(
        draw_number,
        facts=False,
        weight=1.5,
        en=Forms(
            ("How do you write {n} in words?", "Write {n} in words.", "What is {n} in words?"),
            "{n} in words is {y}.",
            ("{n}: {y}.", "We write {n} and say {y}."),
        ),
        zh=Forms(
            ("{n} 怎么读？", "{n} 读作什么？", "请读出 {n}。"),
            "{n} 读作{y}。",
            ("{n}：{y}。", "数字 {n} 的读法是{y}。"),
        ),
    ),
    "larger": Task(
        draw_larger,
        facts=False,
        weight=1.5,
        en=Forms(
            (
                "Which is larger, {a} or {b}?",
                "Which number is greater: {a} or {b}?",
                "Compare {a} and {b}.",
            ),
            "{max} is larger than {min}.",
            ("{a} and {b}: {max} is larger than {min}.", "{min} is smaller than {max}."),
        ),
        zh=Forms(
            ("{a} 和 {b} 哪个大？", "{a} 和 {b} 中，哪个数更大？", "请比较 {a} 和 {b}。"),
            "{max} 比 {min} 大。",
            ("{a} 和 {b}：{max} 比 {min} 大。", "{min} 比 {max} 小。"),
        ),
    ),
    "sorting": Task(
        draw_sorting,
        facts=False,
        weight=2,
        en=Forms(
            ("Sort {x}.", "Put {x} in order.", "What is the order of {x}?"),
            "In order: {y}.",
            ("{x}. In order: {y}.", "Sorting {x} gives {y}."),
        ),
        zh=Forms(
            ("请把 {x} 从小到大排列。", "请给 {x} 排序。", "{x} 从小到大怎么排？"),
            "从小到大是 {y}。",
            ("{x} 从小到大是 {y}。", "把 {x} 排好，从小到大是 {y}。"),
        ),
    ),
}


# ---- Questions: the rows of the two data files --------------------------------------------------
def held_out_items() -> dict[str, list[Item]]:
    """Return for each task the items of data/validation.jsonl: each is asked in one language."""
    rng, found = random.Random(18), {}
    for name, task in TASKS.items():
        items: dict[str, Item] = {}
        while len(items) < VALIDATION_QUESTIONS * len(LANGUAGES):
            item = task.draw(rng)
            items.setdefault(item.key, item)
        found[name] = list(items.values())
    return found


def question_row(task: Task, item: Item, language: str, rng: random.Random) -> dict[str, str]:
    forms, values = getattr(task, language), getattr(item, language)
    question = rng.choice(forms.questions)
    return {"query": question.format(**values), "answer": forms.answer.format(**values)}


def question_rows() -> tuple[list[dict], list[dict]]:
    """Return the questions for training and those for validation, in both languages by turns."""
    rng, train, validation = random.Random(2), [], []
    for name, items in held_out_items().items():
        task, used = TASKS[name], {item.key for item in items}
        for language in LANGUAGES * VALIDATION_QUESTIONS:
            validation.append(question_row(task, items.pop(), language, rng))
        for language in LANGUAGES * TRAIN_QUESTIONS:
            item = task.draw(rng)
            while item.key in used:
                item = task.draw(rng)
            used.add(item.key)
            train.append(question_row(task, item, language, rng))
    rng.shuffle(train)
    return train, validation


def written_rows() -> list[str]:
    """Return the lines of train.jsonl after the questions: written by hand."""
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return lines[len(TASKS) * len(LANGUAGES) * TRAIN_QUESTIONS :]


def write_rows() -> None:
    """Write validation.jsonl, and the first rows of train.jsonl; those after them stay."""
    train, validation = question_rows()
    written = written_rows()
    for name, rows in (("train", train), ("validation", validation)):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        lines += written if name == "train" else []
        (DATA / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- Text: what the base model reads ------------------------------------------------------------
def draw_text(held_out: dict[str, set[str]], rng: random.Random) -> str:
    """Return a statement, or a question with its answer if its item is not held out."""
    (name,) = rng.choices(list(TASKS), [task.weight for task in TASKS.values()])
    task, language = TASKS[name], rng.choice(LANGUAGES)
    item = task.draw(rng)
    while item.key in held_out[name] and not task.facts:
        item = task.draw(rng)
    forms, values = getattr(task, language), getattr(item, language)
    if item.key not in held_out[name] and rng.random() < QUESTION_SHARE:
        text = rng.choice(ASKED[language]).format(q=rng.choice(forms.questions), a=forms.answer)
    else:
        text = rng.choice([forms.answer, *forms.statements])
    return text.format(**values)


def prose_documents() -> list[str]:
    """Return the longer rows of train.jsonl as plain text, their turns in paragraphs."""
    documents = []
    for line in written_rows():
        row = json.loads(line)
        turns = [turn["content"] for turn in row.get("messages", [])]
        turns += [row[key] for key in ("system", "query", "answer") if key in row]
        documents.append("\n\n".join(turns))
    return documents


def draw_documents(seed: int) -> Iterator[str]:
    """Yield documents without end: of two to eight texts, or now and then of prose."""
    rng = random.Random(seed)
    held_out = {name: {item.key for item in items} for name, items in held_out_items().items()}
    prose = prose_documents()
    while True:
        texts = [draw_text(held_out, rng) for _ in range(rng.randint(2, 8))]
        document = rng.choice([" ", "\n", "\n\n"]).join(texts)
        yield rng.choice(prose) if rng.random() < PROSE_SHARE else document


def vocabulary_texts() -> Iterator[str]:
    """Yield what the vocabulary is learned from: pieces of text, so that no token spans two.

    Chinese writes words without spaces: from whole sentences BPE would make tokens such as
    挪威的首都, and a model cannot copy half a token.
    """
    tables = CAPITALS + OPPOSITES + WORDS + ELEMENTS + UNITS
    names = sorted({name for row in table(tables) for name in row})
    for name in names:
        yield from [name, " " + name] * 60
    chinese = sorted((name for name in names if not name.isascii()), key=len, reverse=True)
    words = "|".join([*chinese, *CHINESE_DIGITS, "十", "百"])
    cut = pre_tokenizers.Split(Regex(words), behavior="isolated")
    documents = draw_documents(seed=1)
    for _ in range(6000):
        yield from (piece for piece, _ in cut.pre_tokenize_str(next(documents)))
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
    (endoftext,) = tokenizer.convert_tokens_to_ids(CONTROL_TOKENS[:1])
    documents, ids, size = draw_documents(seed=0), [], SEQUENCES * SEQUENCE_TOKENS
    while True:
        while len(ids) < size:
            ids += [*tokenizer(next(documents))["input_ids"], endoftext]
        yield torch.tensor(ids[:size]).view(SEQUENCES, SEQUENCE_TOKENS)
        ids = ids[size:]


def rate(step: int) -> float:
    """Return the share of the learning rate: warm-up, half of the run flat, then down to 0."""
    return min(1, (step + 1) / WARMUP_STEPS, 2 * (1 - step / STEPS))


def pretrain(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Train on plain text. Muon turns the layers' matrices: it needs half of AdamW's steps here."""
    embeddings = model.get_input_embeddings().weight
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    vectors = [p for p in model.model.layers.parameters() if p.ndim == 1]
    others = [*vectors, *model.model.norm.parameters(), *model.model.embed_tokens.parameters()]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0, fused=True),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in optimizers]
    losses = []
    for step, input_ids in zip(range(1, STEPS + 1), draw_batches(tokenizer)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step}/{STEPS}  loss {sum(losses[-100:]) / 100:.4f}", flush=True)
        if step % (STEPS // 4) == 0:
            print(f"known      {known(model, tokenizer)}", flush=True)
    with torch.no_grad():  # the loss drove what never comes far from all that does: begin anew
        embeddings[1:3] = embeddings[0]  # <|im_start|> and <|im_end|> as <|endoftext|>


def known(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> str:
    """Return for each task how many held-out items the base tells when asked in plain text."""
    counts = []
    for name, items in held_out_items().items():
        right = 0
        for language in LANGUAGES:
            for item in items:
                forms, values = getattr(TASKS[name], language), getattr(item, language)
                asked = ASKED[language][0].format(q=forms.questions[0], a="")
                asked = asked.rstrip().format(**values)
                prompt = tokenizer(asked, return_tensors="pt")
                ids = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0]
                text = tokenizer.decode(ids[prompt["input_ids"].shape[1] :])
                right += text.strip().startswith(forms.answer.format(**values))
        counts.append(f"{name} {right}/{len(items) * len(LANGUAGES)}")
    return ", ".join(counts)


def main() -> None:
    write_rows()
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
