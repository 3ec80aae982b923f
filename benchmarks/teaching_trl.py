"""trl's trainers on a model, for teaching.py, in an interpreter that has trl: no import of ours.

    python teaching_trl.py SPEC.json RESULT.json

SPEC: dict(kind="sft" or "grpo", model=an exported folder, data=a .jsonl file, steps, row_len,
batch_tokens, and what the kind takes). RESULT gets dict(seconds=[of each step], tokens=[...],
counted=[...], prepare_s, versions), tokens and those that count in the loss by step.
"""

import json
import re
import sys
import tempfile
import time
from pathlib import Path

LR = 1e-5  # small, so that a model answers as it did before
END = "<|im_end|>"
NUMBER = re.compile(r"-?\d+")


def main(spec, out):
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    spec = json.loads(Path(spec).read_text(encoding="utf-8"))
    transformers.set_seed(0)
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.eos_token = END  # of an answer
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    lines = Path(spec["data"]).read_text(encoding="utf-8").splitlines()
    data = Dataset.from_list([json.loads(line) for line in lines])
    ends, begun, seen = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            begun.append(time.perf_counter())
            seen.append([0, 0])

        def on_step_end(self, args, state, control, **_):
            ends.append(time.perf_counter())

    common = dict(
        max_steps=spec["steps"],
        learning_rate=LR,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=spec["bf16"],
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        output_dir=tempfile.mkdtemp(prefix="trl-"),
    )
    started = time.perf_counter()
    make = dict(sft=sft_trainer, grpo=grpo_trainer)[spec["kind"]]
    trainer = make(trl, spec, model, tokenizer, data, common)
    prepared = time.perf_counter() - started
    trainer.add_callback(Clock())
    count_batches(trainer, spec["kind"], seen)
    trainer.train()
    # From the end of a step to that of the next, as our log has it: loading counts
    between = [b - a for a, b in zip([begun[0], *ends], ends)]
    found = dict(
        seconds=between,
        tokens=[n for n, _ in seen],
        counted=[n for _, n in seen],
        prepare_s=prepared,
        versions=dict(
            trl=trl.__version__, transformers=transformers.__version__, torch=torch.__version__
        ),
    )
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def count_batches(trainer, kind, seen):
    """Add the tokens of every batch, and those that count, to the step's in `seen`."""
    compute = trainer.compute_loss

    def counting(model, inputs, *args, **kwargs):
        if kind == "sft":
            mask = inputs.get("attention_mask")
            ids = inputs["input_ids"]
            seen[-1][0] += int(mask.sum()) if mask is not None else ids.numel()
            seen[-1][1] += int((inputs["labels"] != -100).sum())
        else:
            answers = int(inputs["completion_mask"].sum())
            seen[-1][0] += int(inputs["prompt_mask"].sum()) + answers
            seen[-1][1] += answers
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = counting


def sft_trainer(trl, spec, model, tokenizer, data, common):
    """packing: "bfd" (whole conversations, attention within them), "wrapped" (cut anywhere,
    attention across) or None (a conversation a row, padded to the batch's longest)."""
    packing = spec["packing"]
    config = trl.SFTConfig(
        **common,
        max_length=spec["row_len"],
        packing=packing is not None,
        packing_strategy=packing or "bfd",
        assistant_only_loss=True,
        per_device_train_batch_size=spec["rows"],
        gradient_accumulation_steps=spec["accumulate"],
    )
    return trl.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)


def number_reward(completions, answer, **_):
    """1 where the last number of an answer is the right one."""
    rewards = []
    for said, right in zip(completions, answer):
        found = NUMBER.findall(said[0]["content"].rpartition("####")[2])
        rewards.append(float(bool(found) and int(found[-1]) == int(right)))
    return rewards


def grpo_trainer(trl, spec, model, tokenizer, data, common):
    """questions of a step, answers to each, answer_tokens at most, kl."""
    data = data.rename_column("messages", "prompt")
    config = trl.GRPOConfig(
        **common,
        per_device_train_batch_size=spec["questions"] * spec["answers"],
        num_generations=spec["answers"],
        max_completion_length=spec["answer_tokens"],
        beta=spec["kl"],
        temperature=1.0,
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=number_reward,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
