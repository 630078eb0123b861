"""What ends a turn ends it everywhere; what people write is text; what a template does to a text is noticed."""

import datetime
import json
import re
from types import SimpleNamespace

import pytest
import torch
from live import adapter
from small import small_base
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from tinytrainer_nb.all import (
    DPOArgs,
    GenerateArgs,
    GRPOArgs,
    Run,
    SFTArgs,
    TinyTrainerError,
    data_file,
    dpo,
    evaluate,
    generate,
    grpo,
    length_reward,
    load_examples,
    load_model,
    save_merged,
    sft,
)
from tinytrainer_nb.compute.generate import stream
from tinytrainer_nb.data import tokens
from tinytrainer_nb.data.rows import encode_rows
from tinytrainer_nb.data.tokens import (
    answer_ends,
    encode_chat,
    encode_text,
    ensure_template,
    prompt_ids,
    render,
    turn_ends,
)
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.lora import add_lora
from tinytrainer_nb.recipes.preference import encode_answer, encode_pairs
from tinytrainer_nb.recipes.pretrain import token_stream
from tinytrainer_nb.recipes.trainer import RunTrainer


def user(text: str) -> dict:
    return dict(role="user", content=text)


def answer(text: str) -> dict:
    return dict(role="assistant", content=text)


def turns(around: str, ask: str = "", end: str = "") -> str:
    "A template: what stands around each turn, what asks for an answer, what ends it all"
    return (
        "{% for m in messages %}" + around + "{% endfor %}"
        "{% if add_generation_prompt %}" + ask + "{% else %}" + end + "{% endif %}"
    )


CHATML = turns("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n")
HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
KINDS = dict(  # template, the text that ends an answer, what stands between the words and their end
    chatml=(CHATML, "<|im_end|>", ""),
    default_system=("<|im_start|>system\nHelp.<|im_end|>\n" + CHATML, "<|im_end|>", ""),
    llama3=(
        "{{ bos_token }}"
        + turns(HEADER + "{{ m.content | trim }}<|eot_id|>", HEADER.replace("{{ m.role }}", "assistant")),
        "<|eot_id|>",
        "",
    ),
    gemma=(
        turns(
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n",
            "<start_of_turn>model\n",
        ),
        "<end_of_turn>",
        "",
    ),
    phi=(turns("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n", "</s>"), "<|end|>", ""),
    mistral=(
        turns("{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + '</s>' }}"),
        "</s>",
        "",
    ),
    line_before=(turns("<|{{ m.role }}|>\n{{ m.content }}\n<|end|>\n", "<|assistant|>\n"), "<|end|>", "\n"),
    all_but_last=(
        turns(
            "<|{{ m.role }}|>\n{{ m.content }}{{ '' if loop.last and m.role == 'assistant' else '<|end|>' }}\n",
            "<|assistant|>\n",
        ),
        "<|end|>",
        "",
    ),
    next_begins=(turns("<|{{ m.role }}|>\n{{ m.content }}\n", "<|assistant|>\n"), "</s>", ""),
    nothing=(turns("{{ m.role }}:\n{{ m.content }}\n", "assistant:\n"), "</s>", ""),
    words=(turns("{{ m.role }}:\n{{ m.content }} [end]\n", "assistant:\n"), "</s>", ""),
)
TALK = [user("One?"), answer("first words"), user("Two?"), answer("second words")]


def with_template(template: str, *more: str, base=None) -> PreTrainedTokenizerFast:
    "The embedded base's tokenizer with a template and the special tokens in it"
    tokenizer = AutoTokenizer.from_pretrained(base or data_file("tiny"))
    special = set(re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>", template)) | set(more)
    if "<|{{ m.role }}|>" in template:
        special |= {"<|user|>", "<|assistant|>"}
    tokenizer.add_special_tokens(dict(additional_special_tokens=sorted(special)))
    tokenizer.chat_template = template
    return tokenizer


def said(tokenizer, row: dict) -> list[str]:
    "The runs of learned tokens, as text"
    runs, inside = [], False
    for label in row["labels"]:
        if label != -100:
            if not inside:
                runs.append([])
            runs[-1].append(label)
        inside = label != -100
    return [tokenizer.decode(run) for run in runs]


# What ends a turn


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_learns_what_ends_a_completion(kind):
    template, end, between = KINDS[kind]
    tokenizer = with_template(template)
    row = encode_chat(tokenizer, TALK)
    learned = [text.strip() for text in said(tokenizer, row)]
    assert learned == [f"first words{between}{end}", f"second words{between}{end}"]
    ends = answer_ends(SimpleNamespace(generation_config=None), tokenizer)
    assert {*ends} == {tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id}
    for named, more in ((7, [7]), ([8, 7], [8, 7]), ([], []), (None, [])):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named))
        assert answer_ends(model, tokenizer) == list(dict.fromkeys(more + ends))
    assert turn_ends(tokenizer)[0] == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("kind", KINDS)
def test_the_conversation_is_learned_as_it_will_be_continued(kind):
    "What comes before the second answer is what a generation begins with"
    tokenizer = with_template(KINDS[kind][0])
    row, asked = encode_chat(tokenizer, TALK), prompt_ids(tokenizer, TALK[:3])
    assert row["input_ids"][: len(asked)] == asked
    assert asked == tokenizer(render(tokenizer, TALK[:3], True), add_special_tokens=False).input_ids


def test_an_answer_joined_to_the_next_heading_is_told(capsys):
    "A token that holds the answer's last letter and the line break after it cannot be followed by an end"
    pieces = pre_tokenizers.Split(Regex(r"words\n|\w+|\s|[^\w\s]"), "isolated")
    bpe = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "words\n": 2, "words": 3, "\n": 4, " ": 5}, "<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pieces, decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = KINDS["nothing"][0]
    for _ in range(3):
        row = encode_chat(tokenizer, TALK)
    assert row["labels"].count(1) == 1 and row["labels"][-1] == 1
    assert capsys.readouterr().err.count("may not learn to stop") == 1


def test_pairs_end_as_turns_do():
    tokenizer = with_template(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids, start = encode_answer(tokenizer, TALK[:3], "yes")
    assert tokenizer.decode(ids[start:]) == "yes<|im_end|>" and ids[-1] == end
    table = load_examples([dict(messages=TALK[:1], chosen="a </s> b", rejected="c <|im_end|>")])
    (pair,), _ = encode_pairs(tokenizer, table, 200)
    assert [pair[name].count(end) for name in ("chosen_ids", "rejected_ids")] == [1, 1]
    assert tokenizer.eos_token_id not in pair["chosen_ids"] and pair["chosen_ids"][-1] == end


def chatml_base(folder):
    "The small base with ChatML, whose end of a turn is not the tokenizer's end token; two end tokens of its own"
    tokenizer = with_template(CHATML, base=small_base())
    model = AutoModelForCausalLM.from_pretrained(small_base(), dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps(dict(bos_token_id=1, eos_token_id=[2, 5], repetition_penalty=1.05, temperature=0.7, use_cache=False))
    )
    return folder


def test_a_run_stops_where_its_turns_end(tmp_path):
    "In generate, stream, evaluate and the merged model under plain `transformers`"
    (tmp_path / "base").mkdir()
    model, tokenizer = load_model(chatml_base(tmp_path / "base"), "none", "fp32", verbose=False)
    rows = [dict(prompt=f"Say {n}", completion=str(n)) for n in range(10, 30)]
    run = sft(
        add_lora(model, LoraArgs(r=16, target_modules="q_proj,v_proj,up_proj,down_proj,lm_head")),
        tokenizer,
        rows,
        SFTArgs(
            max_steps=40,
            batch_size=10,
            learning_rate=5e-3,
            eval_steps=0,
            sample_steps=0,
            save_steps=0,
            out=str(tmp_path / "run"),
        ),
    )
    end, args = tokenizer.convert_tokens_to_ids("<|im_end|>"), GenerateArgs(max_new_tokens=12, temperature=0.0)
    out = generate(run.model, tokenizer, [[user("Say 12")]], args, quiet=True)
    assert out.finished == [True] and out.completion_ids[0][-1] == end and "<|im_end|>" not in out.completions[0]
    assert "".join(stream(run.model, tokenizer, [user("Say 12")], args)) == out.completions[0]
    assert all("<|im_end|>" not in said for said in evaluate(run.model, tokenizer, rows[:3], "length").completions)
    save_merged(run, tmp_path / "merged", "fp32")
    kept = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert kept["eos_token_id"] == [2, 5, end] and "use_cache" not in kept
    assert (kept["repetition_penalty"], kept["temperature"]) == (1.05, 0.7)
    plain, theirs = (kind.from_pretrained(tmp_path / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    asked = theirs.apply_chat_template([user("Say 12")], add_generation_prompt=True, return_tensors="pt")
    spoken = plain.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert spoken.tolist() == out.completion_ids[0]


# What people write is text

STRUCK = [
    user("The <|im_end|> price?</s>"),
    answer("<s>7 coins</s> now 5 coins"),
    user("a<s>"),
    answer("<|im_start|>b"),
]


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    "A small tokenizer of Llama's (old and new) or T5's kind, in which spaces are U+2581"
    pieces = ["<unk>", "<s>", "</s>", *"▁<s>/abcdefghijklmnopqrtuvwxyz0123456789.?:|_#\nATSU", "▁now", "co", "coins"]
    pieces = list(dict.fromkeys(pieces))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if kind == "unigram":
        model = models.Unigram([(piece, -float(len(pieces) - i)) for i, piece in enumerate(pieces)], unk_id=0)
    else:
        vocab |= {"oi": len(vocab), "oin": len(vocab) + 1, "oins": len(vocab) + 2}
        model = models.BPE(vocab, [("c", "o"), ("o", "i"), ("oi", "n")][:1], unk_token="<unk>")
    made = Tokenizer(model)
    if kind == "old":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokenizers() -> dict:
    return {
        "byte-level": with_template(CHATML),
        "default template": ensure_template(AutoTokenizer.from_pretrained(data_file("tiny"))),
        **{kind: ensure_template(sentencepiece(kind)) for kind in ("old", "new", "unigram")},
    }


@pytest.mark.parametrize("name", ["byte-level", "default template", "old", "new", "unigram"])
def test_special_tokens_in_contents_are_text(name):
    tokenizer = tokenizers()[name]
    harmless = [m | dict(content=re.sub(r"[<>|/_]", ".", m["content"])) for m in STRUCK]
    row, plain = encode_chat(tokenizer, STRUCK), encode_chat(tokenizer, harmless)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    counted = [[i for i in r["input_ids"] if i in special] for r in (row, plain)]
    assert counted[0] == counted[1] and len(counted[0]) >= 2  # the template's own, in their order
    learned = said(tokenizer, row)
    ends = tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)[0])
    if tokenizer.unk_token_id is None:
        assert learned == [f"{m['content']}{ends}" for m in STRUCK[1::2]]
    else:
        assert len(learned) == 2 and "coins" in learned[0] and all(text.endswith(ends) for text in learned)
    asked = prompt_ids(tokenizer, STRUCK[:3])
    assert row["input_ids"][: len(asked)] == asked


@pytest.mark.parametrize("name", ["byte-level", "old", "new", "unigram"])
def test_texts_without_special_tokens_are_cut_as_before(name):
    tokenizer = tokenizers()[name]
    row = encode_chat(tokenizer, TALK)
    whole = tokenizer(render(tokenizer, TALK).rstrip(), add_special_tokens=False).input_ids
    assert row["input_ids"][: len(whole)] == whole
    # with one special token in a content, all else is cut as it was
    one = [user("One?</s>"), *TALK[1:]]
    ids = encode_chat(tokenizer, one)["input_ids"]
    after = encode_chat(tokenizer, TALK)["input_ids"][-8:]
    assert ids[-8:] == after and tokenizer.eos_token_id not in prompt_ids(tokenizer, one[:1])


def test_the_pieces_are_those_of_the_tokenizer_itself():
    "`split_special_tokens` is the tokenizers library's own way for a text in which nothing is special"
    tokenizer = with_template(CHATML)
    ids = encode_chat(tokenizer, STRUCK[:2])["input_ids"]
    by_hand = []
    for m in STRUCK[:2]:
        by_hand += tokenizer(f"<|im_start|>{m['role']}\n", add_special_tokens=False).input_ids
        by_hand += tokenizer(m["content"], add_special_tokens=False, split_special_tokens=True).input_ids
        by_hand += tokenizer("<|im_end|>\n", add_special_tokens=False).input_ids
    assert ids == by_hand


def test_the_words_of_a_template_that_are_no_special_tokens_are_text_too():
    "DeepSeek's headings are added tokens that no flag calls special"
    tokenizer = with_template("{% for m in messages %}<|{{ m.role | capitalize }}|>{{ m.content }}</s>{% endfor %}")
    tokenizer.add_tokens(["<|User|>", "<|Assistant|>", "<think>"])
    heading, think = tokenizer.convert_tokens_to_ids(["<|User|>", "<think>"])
    ids = encode_chat(tokenizer, [user("a <|User|> b"), answer("<think> c")])["input_ids"]
    assert ids.count(heading) == 1 and ids.count(think) == 1  # the second is a token of answers


@pytest.mark.parametrize("private", ["\U000f0000", "\U000f0000\U000f0001", "\U0010fffd"])
def test_private_characters_forge_no_token(private):
    tokenizer = with_template(CHATML)
    ids = prompt_ids(tokenizer, [user(f"{private}<|im_end|> </s> {private}</s>")])
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1 and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).count("</s>") == 2


def test_documents_are_text():
    tokenizer, text = AutoTokenizer.from_pretrained(data_file("tiny")), "<s>Once</s> upon <pad>"
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    (row,) = encode_text(tokenizer, text, 100)
    assert row["input_ids"] == [
        bos,
        *tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids,
        end,
    ]
    assert token_stream(tokenizer, [text, "a"]).tolist() == row["input_ids"] + tokenizer("a").input_ids + [end]


def test_rows_with_special_tokens_are_counted(capsys):
    tokenizer = ensure_template(AutoTokenizer.from_pretrained(data_file("tiny")))
    rows = [dict(prompt="q", completion=c) for c in ("a", "<s>b</s>", "<b>c</b>", "</s>")]
    _, reading = encode_rows(tokenizer, load_examples(rows), 100)
    assert reading.special == [2, 4] and "special tokens read as text: 2 rows" in str(reading)
    _, reading = encode_rows(tokenizer, load_examples(rows[:1]), 100)
    assert "special tokens" not in str(reading)
    token_stream(tokenizer, ["a", "b</s>"])
    assert "1 documents hold the text of a special token, such as '</s>'" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_tell_is_refused(monkeypatch):
    tokenizer = with_template(CHATML)
    monkeypatch.setattr("tinytrainer_nb.data.tokens._tried", lambda *_: None)
    with pytest.raises(TinyTrainerError, match="cannot tell it from the token itself"):
        encode_chat(tokenizer, STRUCK)
    assert encode_chat(tokenizer, TALK)


# The first token stands once


@pytest.mark.parametrize("bos, eos", [(True, False), (True, True), (False, False), (False, True)])
@pytest.mark.parametrize("text", ["Once", "<s>Once", ""])
def test_raw_texts_begin_once_and_end_never(bos, eos, text):
    tokenizer = AutoTokenizer.from_pretrained(data_file("tiny"))
    tokenizer.add_bos_token, tokenizer.add_eos_token = bos, eos
    words = tokenizer("Once" if text else "", add_special_tokens=False).input_ids
    begins = bos or text.startswith("<s>")  # a raw prompt may be somebody's rendered template
    assert prompt_ids(tokenizer, text) == [tokenizer.bos_token_id] * begins + words
    (row,) = encode_text(tokenizer, text, 100)
    assert row["input_ids"].count(tokenizer.bos_token_id) == bos
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1 == token_stream(tokenizer, [text]).tolist().count(2)


def test_a_rendered_conversation_is_asked_as_the_conversation():
    tokenizer = ensure_template(AutoTokenizer.from_pretrained(data_file("tiny")))
    text = tokenizer.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True)
    assert prompt_ids(tokenizer, text) == prompt_ids(tokenizer, TALK[:3])


# What a template does to a text

SPOILED = dict(
    lower=("{{ m.content | lower }} ", "changes the text of turn 1 of 2"),
    truncates=("{{ m.content[:22] }} ", "changes the text of turn 1 of 2"),
    joins_lines=("{{ m.content | replace('\n', ' ') }} ", "changes the text of turn 2 of 2"),
    drops_words=("{{ m.content | replace('coins', '') }} ", "changes the text of turn 1 of 2"),
    drops_turns=("{% if m.role == 'user' %}{{ m.content }} {% endif %}", "leaves out turn 2 of 2, of the role assist"),
    doubles_bos=("{{ m.content }}", "writes the first token <s> twice"),
    wants_a_system_turn=("{{ raise_exception('system first') }}", r"\(system first\).*Bring the turns in the order"),
)


@pytest.mark.parametrize("name", SPOILED)
def test_a_template_that_spoils_a_text_is_refused(name):
    around, words = SPOILED[name]
    first = "{{ bos_token }}{{ bos_token }}" if name == "doubles_bos" else ""
    tokenizer = with_template(first + turns(around))
    talk = [user("How many coins has Anna now?"), answer("Anna has\nseven.")]
    for ask in (encode_chat, lambda t, m: prompt_ids(t, m), render):
        with pytest.raises(TinyTrainerError, match=words):
            ask(tokenizer, talk)


def test_a_template_that_moves_a_turn_says_so():
    tokenizer = with_template("{% for m in messages | reverse %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(TinyTrainerError, match="puts in another place turn 2 of 2"):
        render(tokenizer, TALK[:2])


def test_blanks_at_the_ends_may_go():
    tokenizer = with_template(turns("{{ m.role }}:\n{{ m.content | trim }}</s>\n", "assistant:\n"))
    row = encode_chat(tokenizer, [user(" How many? \n"), answer("\n seven ")])
    assert said(tokenizer, row) == ["seven</s>"]


def test_a_template_that_asks_otherwise_than_it_writes_says_so():
    "As those of DeepSeek-R1 and QwQ, which open a thought where they ask and write none before an answer"
    tokenizer = with_template(CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"))
    for talk in (TALK[:2], TALK, [dict(role="system", content="Be short."), *TALK[:2]]):
        with pytest.raises(TinyTrainerError, match=r"asks for an answer with '<think>\\n', which it does not write"):
            encode_chat(tokenizer, talk)
    assert tokenizer.decode(prompt_ids(tokenizer, TALK[:1])).endswith("<think>\n")
    moved = with_template("{{ messages | length }}" + CHATML)
    with pytest.raises(TinyTrainerError, match="rewrites earlier turns"):
        encode_chat(moved, TALK[:2])


# Special tokens that swallow the blanks beside them

SWALLOWING = dict(  # template, what swallows, the answers' runs of learned tokens
    phi3=(turns("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n"), dict(rstrip=True)),
    line_before=(turns("<|{{ m.role }}|>\n{{ m.content }}\n<|end|>\n", "<|assistant|>\n"), dict(lstrip=True)),
    both=(turns("<|{{ m.role }}|> {{ m.content }} <|end|> \n", "<|assistant|> "), dict(lstrip=True, rstrip=True)),
)


@pytest.mark.parametrize("content", ["first words", "first <|end|> words"])
@pytest.mark.parametrize("kind", SWALLOWING)
def test_an_end_token_that_swallows_blanks_is_learned(kind, content):
    template, swallows = SWALLOWING[kind]
    tokenizer = AutoTokenizer.from_pretrained(data_file("tiny"))
    words = [AddedToken(f"<|{w}|>", special=True, normalized=False, **swallows) for w in ("user", "assistant", "end")]
    tokenizer.add_special_tokens(dict(additional_special_tokens=words))
    tokenizer.chat_template = template
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    row = encode_chat(tokenizer, [TALK[0], answer(content), *TALK[2:]])
    assert row["labels"].count(end) == 2 and row["input_ids"].count(end) == 4
    assert [text.split("<|end|>")[-1].strip() for text in said(tokenizer, row)] == ["", ""]
    user_ids = {tokenizer.convert_tokens_to_ids(f"<|{w}|>") for w in ("user", "assistant")}
    assert not user_ids & set(row["labels"])
    ids, _ = encode_answer(tokenizer, TALK[:1], content)
    assert ids[-1] == end


# A template that writes the date

DATED = "{{ strftime_now('%d %b %Y %H') }}\n" + turns(
    "### {{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n", "### assistant: "
)


def test_a_run_writes_one_date(tmp_path, monkeypatch):
    "Rows, samples and evaluations of a run, also where it goes on a week later"

    class Day(datetime.datetime):
        today = 1

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, cls.today, 12)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)
    monkeypatch.setattr(tokens, "datetime", Day, raising=False)
    train_step = RunTrainer.training_step
    rows = [dict(prompt=f"How many {n}?", completion=f"{n} hens") for n in range(24)]

    def train(out: str, step=train_step):
        Day.today = 1
        model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
        tokenizer.chat_template = DATED
        args = SFTArgs(max_steps=4, batch_size=4, save_steps=2, eval_steps=2, sample_steps=2, out=str(tmp_path / out))
        monkeypatch.setattr(RunTrainer, "training_step", step)
        try:
            return sft(add_lora(model, LoraArgs(r=2)), tokenizer, rows, args)
        finally:
            monkeypatch.setattr(RunTrainer, "training_step", train_step)

    def die(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise OSError("no power")
        return train_step(self, *args, **kwargs)

    whole = train("whole")
    with pytest.raises(OSError):
        train("cut", die)
    Day.today = 9
    assert adapter(Run.open(tmp_path / "cut").resume()) == adapter(whole)
    losses = [e["loss"] for e in Run.open(tmp_path / "cut").events if e["kind"] == "evaluation"]
    assert losses == [e["loss"] for e in whole.events if e["kind"] == "evaluation"] and len(losses) == 2


@pytest.mark.parametrize("recipe", ["sft", "dpo", "grpo"])
def test_no_recipe_reads_the_clock(recipe, tmp_path, monkeypatch):
    class Never(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            raise AssertionError("the clock was read")

    monkeypatch.setattr(chat_template_utils, "datetime", Never)
    monkeypatch.setattr(tokens, "datetime", Never, raising=False)
    model, tokenizer = load_model(small_base(), "none", "fp32", verbose=False)
    tokenizer.chat_template = DATED
    model, few = (
        add_lora(model, LoraArgs(r=2)),
        dict(max_steps=1, batch_size=2, save_steps=0, out=str(tmp_path / "run")),
    )
    rows = [dict(prompt=f"Say {n}", completion=str(n)) for n in range(20)]
    pairs = [dict(prompt=f"Say {n}", chosen=str(n), rejected="no") for n in range(20)]
    looks = dict(eval_steps=1, sample_steps=1)
    if recipe == "sft":
        run = sft(model, tokenizer, rows, SFTArgs(**few, **looks))
    elif recipe == "dpo":
        run = dpo(model, tokenizer, pairs, DPOArgs(**few, **looks))
    else:
        run = grpo(model, tokenizer, rows, length_reward, GRPOArgs(num_generations=2, max_new_tokens=4, **few, **looks))
    assert run.status == "finished"
    began = datetime.datetime.fromtimestamp(run.info["created"], datetime.timezone.utc)
    with tokens.one_moment(run.info["created"]):
        assert render(tokenizer, TALK[:1]).startswith(f"{began:%d %b %Y %H}\n")
    with pytest.raises(TinyTrainerError, match="refuses this conversation"):
        render(tokenizer, TALK[:1])  # outside of a run the clock counts
