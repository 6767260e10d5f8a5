#!/usr/bin/env python3
"""ppo_trl.py -- PPO with the flags, folders and files of `align ppo`, by TRL 0.11's PPOTrainer.

    python docs/tools/ppo_trl.py --model_name_or_path DIR --output_dir DIR ... with one of
        --reward_model_path DIR --dataset_name FILE     it answers prompts and is judged
        --rollouts FILE                                 steps on stored rollouts

The other flags are PPOConfig's. On several GPUs: accelerate launch docs/tools/ppo_trl.py ..., each
with a batch of its own.
"""

import json
import os
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Optional

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import LengthSampler


@dataclass
class Files:
    model_name_or_path: str
    output_dir: str
    ref_model: Optional[str] = None  # default: the start model
    reward_model_path: Optional[str] = None
    # JSON Lines with `prompt`, or `text` to take the beginnings of
    dataset_name: Optional[str] = None
    rollouts: Optional[str] = None
    max_steps: int = 10
    output_min_length: int = 4
    output_max_length: int = 16


def read(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def stored_rollouts():
    rows = cycle(read(files.rollouts))
    while True:
        batch, keys = list(islice(rows, config.batch_size)), ("query_ids", "response_ids", "score")
        yield [[torch.tensor(row[key]) for row in batch] for key in keys]


def live_rollouts():
    rows, device = read(files.dataset_name), trainer.accelerator.device
    query_length = LengthSampler(2, 8)
    length = LengthSampler(files.output_min_length, files.output_max_length)
    load = AutoModelForSequenceClassification.from_pretrained
    judge = load(files.reward_model_path, num_labels=1).to(device).eval()
    sampling = dict(min_length=-1, top_k=0, top_p=1.0, do_sample=True)
    sampling.update(pad_token_id=tokenizer.eos_token_id, return_prompt=False)
    while True:
        queries, responses, scores = [], [], []
        for i in torch.randint(len(rows), (config.batch_size,)).tolist():
            ids = tokenizer(rows[i].get("prompt") or rows[i]["text"])["input_ids"]
            if not rows[i].get("prompt"):
                ids = ids[: query_length()]
            query = torch.tensor(ids).to(device)
            response = trainer.generate(query, max_new_tokens=length(), **sampling)[0]
            with torch.no_grad():
                scores.append(judge(torch.cat([query, response])[None]).logits[0, 0])
            queries.append(query)
            responses.append(response)
        yield queries, responses, scores


files, config = HfArgumentParser((Files, PPOConfig)).parse_args_into_dataclasses()
torch.manual_seed(config.seed)
tokenizer = AutoTokenizer.from_pretrained(files.model_name_or_path)
policy, reference = (
    AutoModelForCausalLMWithValueHead.from_pretrained(path)
    for path in (files.model_name_or_path, files.ref_model or files.model_name_or_path)
)
trainer = PPOTrainer(config, policy, reference, tokenizer)
os.makedirs(files.output_dir, exist_ok=True)
rollouts = stored_rollouts() if files.rollouts else live_rollouts()
with open(files.output_dir + "/stats_all.jsonl", "w") as log:
    for step, (queries, responses, scores) in enumerate(islice(rollouts, files.max_steps), 1):
        stats = trainer.step(queries, responses, scores)
        stats = {key: float(value) for key, value in stats.items() if not getattr(value, "ndim", 0)}
        stats["env/reward_mean"] = torch.stack(list(scores)).mean().item()
        if trainer.accelerator.is_main_process:
            log.write(json.dumps(stats) + "\n")
            line = ["ppo: step %d/%d" % (step, files.max_steps)]
            for key in ("env/reward_mean", "objective/kl", "ppo/loss/total"):
                line.append("%s %.4g" % (key, stats[key]))
            print("  ".join(line))
if trainer.accelerator.is_main_process:
    trainer.accelerator.unwrap_model(policy).save_pretrained(files.output_dir)
    tokenizer.save_pretrained(files.output_dir)
