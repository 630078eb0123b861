"""Numbers turned by hand: in the model for an answer alone, exactly as if they had been set; a run that trains them
never notices."""

import pytest
import torch
from live import adapter, figures, until
from safetensors.torch import save_file

from tinytrainer_nb.all import (
    GRPOArgs,
    PPOArgs,
    Run,
    SFTArgs,
    TinyLoraArgs,
    TinyTrainerError,
    add_tinylora,
    data_file,
    from_line,
    grpo,
    load_examples,
    load_model,
    ppo,
    sft,
)
from tinytrainer_nb.compute.arguments import GenerateArgs
from tinytrainer_nb.compute.decode import Decoder
from tinytrainer_nb.compute.generate import generate
from tinytrainer_nb.hardware import mix_seed
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.lora import add_lora, save_adapter
from tinytrainer_nb.model.tinylora import few_numbers, trained_vector
from tinytrainer_nb.panels.run_panel import run_panel
from tinytrainer_nb.panels.sliders import (
    bars_html,
    dial_panel,
    has_dials,
    run_numbers,
    saved_numbers,
    scale_of,
    turned,
)
from tinytrainer_nb.recipes.start import begin, describe

QUIET = dict(eval_steps=0, sample_steps=0)
IDS = torch.arange(3, 35)[None]


def base(quantization="none"):
    return load_model("tiny", quantization, verbose=False)


def thirteen(quantization="none", **args):
    model, tokenizer = base(quantization)
    return add_tinylora(model, TinyLoraArgs(**dict(u=1, n_tie=4) | args)), tokenizer


def random_numbers(model, seed=1):
    v = trained_vector(model)
    with torch.no_grad():
        v.copy_(torch.randn(v.shape, generator=torch.Generator().manual_seed(seed)) / 2)
    return v


def vowels(prompt, completion, **row):
    return sum(c in "aeiou" for c in completion) / max(1, len(completion))


def start(out, recipe=grpo, **more):
    settings = (
        dict(
            max_steps=4,
            batch_size=4,
            num_generations=3,
            max_new_tokens=24,
            learning_rate=0.05,
            save_steps=2,
            out=str(out),
        )
        | QUIET
        | more
    )
    return recipe(
        *thirteen(), data_file("rl.jsonl"), vowels, (GRPOArgs if recipe is grpo else PPOArgs)(**settings), live=True
    )


def logits(model):
    with Decoder(model, None, rows=1).on():
        quick = model(IDS).logits
    with torch.no_grad():
        return quick, model.eval()(IDS).logits


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_turned_is_as_set_by_hand(quantization):
    model, _ = thirteen(quantization, u=2, n_tie=8)  # 14 numbers in 7 groups
    v = random_numbers(model)
    kept, plain, moves = v.detach().clone(), logits(model), {0: 1.0, 3: -0.25, 13: 0.0}
    with turned(model, moves):
        moved = logits(model)
    assert torch.equal(v, kept) and all(map(torch.equal, logits(model), plain))
    with torch.no_grad():
        v[0, 0], v[1, 1], v[6, 1] = 1.0, -0.25, 0.0
    assert all(map(torch.equal, logits(model), moved)) and not torch.equal(moved[0], plain[0])
    with pytest.raises(ValueError):
        with turned(model, {2: 5.0}):
            raise ValueError
    assert v[1, 0] == kept[1, 0]


def test_the_panel_asks_both(tmp_path):
    "The same question and seed: as trained, and as the sliders say; what one line holds loads as moved"
    model, tokenizer = thirteen()
    v = random_numbers(model)
    kept, panel = v.detach().clone(), dial_panel(model, tokenizer)
    panel.longest.value, panel.temperature.value, panel.seed.value = 24, 0.9, 7
    panel.sliders[6].value = panel.sliders[2].value = 0.75
    said = panel.answer("Who lives by the sea?")
    settings = GenerateArgs(max_new_tokens=24, temperature=0.9)
    alone = lambda: generate(
        model, tokenizer, [[dict(role="user", content="Who lives by the sea?")]], settings, [mix_seed(7, 0)], quiet=True
    ).completions[0]
    assert torch.equal(v, kept) and said["trained"] == alone()
    line = panel.as_line()
    assert torch.equal(v, kept)
    there = trained_vector(from_line(base()[0], line))
    assert there[6] == there[2] == 0.75 and there[0] == kept[0]
    panel.zero()
    assert trained_vector(from_line(base()[0], panel.as_line())).any().item() is False
    panel.reset()
    assert not panel.moves and torch.equal(trained_vector(from_line(base()[0], panel.as_line())), kept)
    assert "trained numbers" in panel.twin() and "Who lives" in panel.twin()
    panel.close()
    with torch.no_grad():
        v[6] = v[2] = 0.75
    assert said["moved"] == alone() != said["trained"]


@pytest.mark.slow
def test_a_run_that_was_turned_continues_bit_for_bit(tmp_path):
    alone = start(tmp_path / "alone").wait()
    run = start(tmp_path / "turned")
    panel = dial_panel(run)
    panel.longest.value = 16
    until(lambda: run.step >= 1)
    run.pause()
    until(lambda: run.status == "paused")
    until(lambda: not panel.sliders[0].disabled)
    v = trained_vector(run.model)
    kept = v.detach().clone()
    for i in range(13):
        panel.sliders[i].value = 0.5 if i % 2 else -0.5
    said = panel.answer("Who lives by the sea?")
    assert said["trained"] != said["moved"] and torch.equal(v, kept)
    panel.longest.value, panel.temperature.value, panel.say.value = 800, 1.0, "Tell me a long story."
    panel.post()
    until(lambda: len(panel.turns) == 2 and panel.turns[1]["trained"])
    panel.stop()
    panel.answering.join(60)
    assert panel.as_line() and torch.equal(v, kept) and run.status == "paused"
    run.unpause()
    run.wait(120)
    assert run.status == "finished" and adapter(run) == adapter(alone) and figures(run) == figures(alone)
    # The sliders follow what was trained
    until(lambda: [slider.value for slider in panel.sliders] == saved_numbers(run.folder / "adapter"))
    assert not panel.moves and any(panel.trained)
    panel.close()


def test_a_page_that_rounds_is_no_hand():
    "A slider in a page stands on the next of its steps, and says so"
    model, tokenizer = thirteen()
    v = random_numbers(model)
    panel = dial_panel(model, tokenizer)

    def page():
        for slider in panel.sliders:
            slider.value = round(slider.value / slider.step) * slider.step

    page()
    assert not panel.moves and any(s.value != x for s, x in zip(panel.sliders, panel.trained))
    panel.zero()
    until(lambda: not any(s.value for s in panel.sliders))
    page()
    assert not trained_vector(from_line(base()[0], panel.as_line())).any()
    panel.sliders[4].value = panel.sliders[4].step
    assert len(panel.moves) == 13 and panel.moves[4] == panel.sliders[4].step
    panel.reset()
    until(lambda: [s.value for s in panel.sliders] == panel.trained)
    page()
    assert torch.equal(trained_vector(from_line(base()[0], panel.as_line())), v)
    panel.close()


@pytest.mark.slow
def test_locked_while_it_goes_on(tmp_path):
    run = start(tmp_path / "run", max_steps=60)
    panel = dial_panel(run)
    until(lambda: run.step >= 2 and panel.sliders)
    assert all(s.disabled for s in panel.sliders) and panel.zero_button.disabled and "pause it" in panel.head.value
    first = panel.bars.value
    until(lambda: panel.bars.value != first)  # bars move
    run.stop()
    run.wait(60)
    until(lambda: not panel.sliders[0].disabled)
    panel.close()


def test_numbers_in_the_journal(tmp_path):
    "Those of the policy, at every step, in every recipe; for another process, too"
    lessons = load_examples(data_file("sft.jsonl")).select(range(30))
    model, tokenizer = thirteen()
    run = sft(
        model,
        tokenizer,
        lessons,
        SFTArgs(
            max_steps=3,
            batch_size=4,
            warmup_steps=0,
            learning_rate=0.01,
            save_steps=0,
            out=str(tmp_path / "sft"),
            **QUIET,
        ),
    )
    told = [e["numbers"] for e in run.events if e["kind"] == "metrics"]
    assert len(told) == 3 and all(len(t) == 13 for t in told) and told[0] != told[1]
    assert told[2] == pytest.approx(trained_vector(model).flatten().tolist(), rel=1e-5)
    assert run_numbers(Run.open(run.folder)) == trained_vector(model).flatten().tolist()  # the result, exactly
    ended = start(tmp_path / "ppo", ppo, max_steps=2, value_adapter=True, num_generations=2).wait()
    assert few_numbers(ended.model) == pytest.approx([e["numbers"] for e in ended.events if e["kind"] == "metrics"][-1])


def test_who_has_dials(tmp_path):
    def run_of(name, model):
        from tinytrainer_nb.recipes.start import describe

        run = Run.create(tmp_path / name, "sft", SFTArgs(), may_change=[], load=describe(model, base()[1]))
        begin(run, model, base()[1])
        return run

    assert (
        has_dials(run_of("13", thirteen()[0]))
        and has_dials(run_of("49", thirteen(n_tie=1)[0]))
        and has_dials(run_of("peft", thirteen(u=4, n_tie=13, parametrization="peft")[0]))
    )
    assert not has_dials(run_of("65", thirteen(u=5, n_tie=4)[0])) and not has_dials(
        run_of("lora", add_lora(base()[0], LoraArgs(r=1)))
    )
    assert few_numbers(thirteen(u=5, n_tie=4)[0]) == [] == few_numbers(base()[0]) == few_numbers(None)
    assert not has_dials(Run.create(tmp_path / "none", "sft", SFTArgs(), may_change=[]))
    panel = dial_panel(Run.open(tmp_path / "65"))
    assert "does not train" in panel.head.value and not panel.sliders


@pytest.mark.parametrize("form", ["paper", "peft"])
def test_saved_numbers_are_in_order(form, tmp_path):
    model, _ = thirteen(u=2, n_tie=4, parametrization=form)  # eleven groups and more: 10 comes after 9
    v = random_numbers(model)
    save_adapter(model, tmp_path / form)
    assert len(v) > 10 and saved_numbers(tmp_path / form) == v.flatten().tolist()


def test_bars_tell_in_words_too():
    html = bars_html([0.5, -0.25], {1: 1.0})
    assert "0: +0.5" in html and "1: -0.25, moved to +1" in html and "alt=" in html
    assert [scale_of(v) for v in ([0.0], [0.5], [0.6], [-2.4], [7.0], [100.0])] == [1, 1, 2, 5, 20, 200]


def test_a_line_that_cannot_be_is_told():
    panel = dial_panel(*thirteen(u=1, n_tie=4, parametrization="peft"))
    with pytest.raises(TinyTrainerError, match="PEFT's parametrization"):
        panel.as_line()
    panel.one_line()
    until(lambda: "PEFT" in panel.trouble.value)
    panel.close()


def tensors(path, **named):
    save_file({f"base_model.{name}": t for name, t in named.items()}, path, metadata={"format": "pt"})


DAMAGED = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "no number in a name": lambda path: tensors(path, **{"tinylora_v.x": torch.ones(3)}),
    "NaN": lambda path: tensors(path, tinylora_v=torch.tensor([1.0, float("nan")])),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_adapter_has_no_dials_and_no_other_panel_suffers(how, tmp_path):
    model, tokenizer = thirteen()
    run = Run.create(tmp_path / "run", "sft", SFTArgs(), may_change=[], load=describe(model, tokenizer))
    begin(run, model, tokenizer)
    run.set_status("stopped", 0)
    panel = run_panel(run)
    assert list(panel.rooms) == ["Chat", "Numbers"]
    panel.close()
    DAMAGED[how](run.folder / "start" / "adapter_model.safetensors")
    with pytest.raises(TinyTrainerError, match="adapter_model.safetensors: .*Restore the file"):
        has_dials(run)
    panel = run_panel(run)
    assert list(panel.rooms) == ["Chat"]
    panel.close()
