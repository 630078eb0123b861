"""TinyLlama's own tokenizer and chat template, whose padding token is its end token: the usual cause of a model that
never stops."""

import pytest
from transformers import AutoTokenizer

from tinytrainer_nb.compute.arguments import GenerateArgs
from tinytrainer_nb.compute.generate import generate
from tinytrainer_nb.core import data_file
from tinytrainer_nb.data.formats import load_examples, load_prompts
from tinytrainer_nb.data.tokens import encode_chat, pack_row, prompt_ids, render
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora
from tinytrainer_nb.recipes.arguments import SFTArgs
from tinytrainer_nb.recipes.sft import sft

CHAT = [
    dict(role="system", content="Be short."),
    dict(role="user", content="How much is 2 + 2?"),
    dict(role="assistant", content="It is 4."),
    dict(role="user", content="And 3 + 3?"),
    dict(role="assistant", content="6, and that is all."),
]
TEXT = (
    "<|system|>\nBe short.</s>\n<|user|>\nHow much is 2 + 2?</s>\n<|assistant|>\nIt is "
    "4.</s>\n<|user|>\nAnd 3 + 3?</s>\n<|assistant|>\n6, and that is all.</s>\n"
)
LEARNED = ["It", "▁is", "▁", "4", ".", "</s>", "6", ",", "▁and", "▁that", "▁is", "▁all", ".", "</s>"]


@pytest.fixture
def tokenizer(shared):
    return AutoTokenizer.from_pretrained(shared / "models" / "tinyllama-tokenizer")


@pytest.mark.shared
def test_two_turns_in_text_and_mask(tokenizer):
    assert render(tokenizer, CHAT) == TEXT
    row = encode_chat(tokenizer, CHAT)
    assert row["input_ids"] == tokenizer(TEXT, add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens([t for t in row["labels"] if t != -100]) == LEARNED
    assert all(label in (-100, t) for t, label in zip(row["input_ids"], row["labels"]))
    ends = [i for i, t in enumerate(row["input_ids"]) if t == tokenizer.eos_token_id]
    # Of system, user, assistant, user, assistant
    assert [row["labels"][i] != -100 for i in ends] == [
        False,
        False,
        True,
        False,
        True,
    ]
    asked = prompt_ids(tokenizer, CHAT[:4])
    # Where learning begins, generation will
    assert asked == row["input_ids"][: len(asked)] and row["labels"][len(asked)] == row["input_ids"][len(asked)]


@pytest.mark.shared
def test_padding_is_not_learned_and_the_end_is(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = encode_chat(tokenizer, CHAT)
    packed = pack_row([row], multiple=128)
    assert packed["input_ids"].shape == (1, 128)
    # The ends in, what fills up the row out
    assert packed["shift_labels"].tolist() == [t for t in row["labels"] if t != -100]
    assert packed["logits_to_keep"].max() < len(row["input_ids"])


def share_that_stops(tokenizer, model) -> float:
    prompts = [p["messages"] for p in load_prompts(data_file("heldout.jsonl"))[:24]]
    out = generate(model, tokenizer, prompts, GenerateArgs(max_new_tokens=128, temperature=0), quiet=True)
    return sum(ids[-1] == tokenizer.eos_token_id for ids in out.completion_ids) / len(prompts)


@pytest.mark.slow  # the quick tests of labels and padding hold what it rests on
@pytest.mark.parametrize("masked", [False, True], ids=["as it is", "end token masked like padding"])
def test_a_model_learns_to_stop_though_padding_is_its_end_token(tmp_path, masked, monkeypatch):
    "The second case makes the usual mistake, to show that the first would notice it"
    model, tokenizer = load_model("tiny", quantization="none", verbose=False)
    tokenizer.eos_token = tokenizer.pad_token = "~"  # which the base has never seen at an end
    if masked:
        from tinytrainer_nb.data import rows as module

        plain = module.encode_chat
        monkeypatch.setattr(
            module,
            "encode_chat",
            lambda t, *a: (
                (row := plain(t, *a)) | dict(labels=[-100 if x == t.pad_token_id else x for x in row["labels"]])
            ),
        )
    sft(
        add_lora(model, LoraArgs(r=8)),
        tokenizer,
        load_examples(data_file("sft.jsonl")).select(range(400)),
        SFTArgs(
            max_steps=40,
            batch_size=4,
            learning_rate=2e-3,
            eval_steps=0,
            sample_steps=0,
            save_steps=0,
            out=str(tmp_path / "run"),
        ),
    )
    stops = share_that_stops(tokenizer, model)
    assert stops < 0.5 if masked else stops > 0.9, stops
