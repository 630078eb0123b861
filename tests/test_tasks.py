"""Public tasks: scores row by row as the harness's own model gives them, files, rules, programs, intervals."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinytrainer_nb.core import TinyTrainerError, data_file
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.recipes.tasks import ask_tasks, harness_model, task_names

ARC = [
    dict(
        id=str(i),
        question=f"How many legs have {i} hens?",
        choices=dict(text=[f"{i}", f"{2 * i} legs", "a hen", "They have none at all."], label=list("ABCD")),
        answerKey="B",
    )
    for i in range(3, 7)
]
BOOK = [dict(id=r["id"], question_stem=r["question"], choices=r["choices"], answerKey=r["answerKey"]) for r in ARC]
BOOL = [
    dict(passage=f"Mia has {i} red apples. " * (1 + i * i), question=f"does mia have {i} apples", idx=i, label=i % 2)
    for i in range(4)
]
WINO = [
    dict(sentence=f"Mia gave Tom {i} apples because _ was hungry.", option1="Mia", option2="Tom", answer="2")
    for i in range(3)
]
SWAG = [
    dict(
        ind=i,
        activity_label="Cooking",
        ctx_a=f"A man cooks {i} eggs.",
        ctx_b="then he",
        endings=["[title] eats  them.", "flies.", "runs away from all of his eggs.", "is."],
        label=str(i % 4),
        split="val",
    )
    for i in range(4)
]
PIQA = [dict(goal=f"count to {i}", sol1=f"say {i}.", sol2="sleep for a long time ") for i in range(4)]
LAMBADA = [
    dict(context=f'"Tom has {i} apples," said Mia. "How many apples has', continuation="Tom") for i in range(3)
]
GSM = [
    dict(question=f"Tom has {i} apples and gets {i + 1}. How many?", answer=f"{i} + {i + 1}\n#### {2 * i + 1}")
    for i in range(9)
]
MMLU = [(f" What is {i} + 1?", i, i + 1, i + 2, i + 3, 1) for i in range(6)]
BBH = [dict(input=f"not ( True ) and {i % 2 == 0} is", target="False") for i in range(5)]
CODE = [
    dict(
        task_id=f"HumanEval/{i}",
        prompt=f'def add(n):\n    """ Add {i} to n. """\n',
        entry_point="add",
        canonical_solution=f"    return n + {i}\n",
        test=f"def check(candidate):\n    assert candidate(1) == {i + 1}\n",
    )
    for i in range(2)
]
# Task: file, what stands in it, the harness's description, what of it names the data
LIKELY = {
    "arc_easy": ("arc_easy/test.jsonl", ARC, "arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc_challenge/test.jsonl", ARC[::-1], "arc/arc_challenge.yaml", "test"),
    "openbookqa": ("openbookqa/test.jsonl", BOOK, "openbookqa/openbookqa.yaml", "test"),
    "boolq": ("boolq/validation.jsonl", BOOL, "super_glue/boolq/default.yaml", "validation"),
    "winogrande": ("winogrande/validation.jsonl", WINO, "winogrande/default.yaml", "validation"),
    "hellaswag": ("hellaswag/validation.jsonl", SWAG, "hellaswag/hellaswag.yaml", "validation"),
    "piqa": ("piqa/valid.jsonl", PIQA, "piqa/piqa.yaml", "validation"),
    "lambada_openai": ("lambada_openai/lambada_openai.jsonl", LAMBADA, "lambada/lambada_openai.yaml", "test"),
    "mmlu_anatomy": ("mmlu/test/anatomy_test.csv", MMLU, "mmlu/default/mmlu_anatomy.yaml", "test"),
}
WRITTEN = {
    "gsm8k": ("gsm8k/test.jsonl", GSM[:3], "gsm8k/gsm8k.yaml", "test"),
    "bbh_fewshot_boolean_expressions": (
        "bbh/boolean_expressions.json",
        BBH,
        "bbh/fewshot/boolean_expressions.yaml",
        "test",
    ),
}


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def lay(folder: Path) -> Path:
    "Files as their authors publish them"
    for name, rows, *_ in [*LIKELY.values(), *WRITTEN.values()]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            for split in ("test", "dev"):
                other = folder / name.replace("test", split)
                other.parent.mkdir(exist_ok=True)
                with open(other, "w", newline="") as f:
                    csv.writer(f).writerows([("question", *(f"choice{i}" for i in range(4)), "answer"), *rows])
        elif path.suffix == ".json":
            path.write_text(json.dumps(dict(canary="no", examples=rows)))
        else:
            path.write_text(lines(rows))
    (folder / "piqa" / "valid-labels.lst").write_text("0\n1\n0\n1\n")
    (folder / "gsm8k" / "train.jsonl").write_text(lines(GSM[3:]))
    (folder / "humaneval").mkdir()
    (folder / "humaneval" / "HumanEval.jsonl").write_text(lines(CODE))
    return folder


@pytest.fixture(scope="module")
def evals(tmp_path_factory) -> Path:
    return lay(tmp_path_factory.mktemp("evals"))


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", quantization="none", dtype="fp32", verbose=False)


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason='needs lm-eval: pip install -e ".[eval]"')


def their_rows(name: str, folder: Path) -> dict[str, list]:
    "The rows in the columns that the harness reads, by split"
    file, rows, _, split = {**LIKELY, **WRITTEN}[name]
    if name == "piqa":
        return {split: [row | dict(label=i % 2) for i, row in enumerate(rows)]}
    if name == "lambada_openai":
        return {split: [dict(text=row["context"] + " " + row["continuation"]) for row in rows]}
    if name == "mmlu_anatomy":
        made = [dict(question=q, choices=[str(c) for c in choices], answer=a) for q, *choices, a in rows]
        return dict(test=made, dev=made)
    return {split: rows} | (dict(train=GSM[3:]) if name == "gsm8k" else {})


def described(name: str, rows: dict, folder: Path, path: str) -> str:
    "A description that takes the harness's own and reads `rows` from files: its path"
    import lm_eval.tasks

    files = {}
    for split, own in rows.items():
        files[split] = str(folder / f"{name}.{split}.jsonl")
        Path(files[split]).write_text(lines(own))
    splits = {f"{s}_split": s if s in rows else None for s in ("training", "validation", "test")}
    splits["training_split"] = "train" if "train" in rows else None
    said = dict(
        include=str(Path(lm_eval.tasks.__file__).parent / path),
        task=f"theirs_{name}",
        dataset_path="json",
        dataset_name=None,
        dataset_kwargs=dict(data_files=files),
        **splits,
    )
    (folder / f"{name}.yaml").write_text(json.dumps(said))  # JSON is YAML
    return str(folder / f"{name}.yaml")


def oracle(base: str | Path, paths: list[str], limit: int | None = None) -> dict:
    "What the harness says with its own model, by task: its records of all rows, and its scores"
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    lm = HFLM(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(base), softmax_dtype="float32", batch_size=1
    )
    found = simple_evaluate(model=lm, tasks=paths, limit=limit, bootstrap_iters=0)
    return {name.removeprefix("theirs_"): rows for name, rows in found["samples"].items()} | dict(
        results={name.removeprefix("theirs_"): said for name, said in found["results"].items()}
    )


def worst(ours, theirs: list[dict]) -> float:
    "The largest difference between log-likelihoods"
    both = [(a, [resps[0][0] for resps in b["resps"]]) for a, b in zip(ours.logprobs, theirs, strict=True)]
    return max(abs(x - y) for a, b in both for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("base", ["tiny", "stories260k"])
def test_log_likelihoods_are_the_harnesss_own(base, evals, tmp_path, lm_eval, monkeypatch, request):
    "Row by row, and every metric; a context of 512 tokens loses the beginning of long passages, as there"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = data_file("tiny") if base == "tiny" else request.getfixturevalue("shared") / "models" / base
    theirs = oracle(folder, [described(n, their_rows(n, evals), tmp_path, LIKELY[n][2]) for n in LIKELY])
    model, tokenizer = load_model(str(folder), quantization="none", dtype="fp32", verbose=False)
    rows, how = ask_tasks(model, tokenizer, evals, list(LIKELY), torch.float32)
    for name in LIKELY:
        own = rows[name][0]
        assert worst(own, theirs[name]) < 5e-4, name
        for metric, values in own.values.items():
            assert values == [float(row[metric]) for row in theirs[name]] or metric == "perplexity", (name, metric)
        assert own.prompts == [row["arguments"][0][0] for row in theirs[name]]
    assert how["dtype"] == "fp32" and how["bos"] == "<s>"
