"""GRPO on GSM8K prompts with TRL's GRPOTrainer at its defaults: one prompt a step, `--group` completions each."""

import tempfile
from common import *
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

args = arguments(group=8, completion=64)
model, tokenizer = load(args)
rows = load_dataset("json", data_files=args.data, split="train").select(range(args.steps))
rows = rows.map(lambda r: {"prompt": [{"role": "user", "content": r["question"]}]}, remove_columns=rows.column_names)
reward = lambda completions, **_: [len(set(c[0]["content"])) / 50 for c in completions]  # varies within a group
config = GRPOConfig(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=args.group,
    num_generations=args.group,
    max_completion_length=args.completion,
    max_steps=args.steps,
    logging_steps=1,
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
    bf16=args.precision == "bf16",
    disable_tqdm=True,
    save_strategy="no",
)
clock = Clock()
trainer = GRPOTrainer(
    model,
    reward_funcs=reward,
    args=config,
    train_dataset=rows,
    processing_class=tokenizer,
    callbacks=[clock],
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
report(
    peer="trl grpo",
    quantization=args.quantization,
    group=args.group,
    completion=args.completion,
    seconds_per_step=round(clock.seconds() / (args.steps - 1), 3),
)
