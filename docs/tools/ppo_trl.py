#!/usr/bin/env python3
"""ppo_trl.py -- PPO with the flags, folders and files of `align ppo`, by TRL 0.11's PPOTrainer.

    python docs/tools/ppo_trl.py --model_name_or_path DIR --reward_model_path DIR --dataset_name FILE --output_dir DIR ...
    python docs/tools/ppo_trl.py --model_name_or_path DIR --rollouts FILE --output_dir DIR ...       steps on stored rollouts

The other flags are PPOConfig's. On several GPUs: accelerate launch docs/tools/ppo_trl.py ..., each with a batch of its own.
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
    ref_model: Optional[str] = None              # default: the start model
    reward_model_path: Optional[str] = None
    dataset_name: Optional[str] = None           # JSON Lines with `prompt`, or `text` to take the beginnings of
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
        batch = list(islice(rows, config.batch_size))
        yield [[torch.tensor(row[key]) for row in batch] for key in ("query_ids", "response_ids", "score")]


def live_rollouts():
    rows, query_length, length = read(files.dataset_name), LengthSampler(2, 8), LengthSampler(files.output_min_length, files.output_max_length)
    judge = AutoModelForSequenceClassification.from_pretrained(files.reward_model_path, num_labels=1).to(trainer.accelerator.device).eval()
    while True:
        queries, responses, scores = [], [], []
        for i in torch.randint(len(rows), (config.batch_size,)).tolist():
            ids = tokenizer(rows[i].get("prompt") or rows[i]["text"])["input_ids"]
            queries.append(torch.tensor(ids if rows[i].get("prompt") else ids[:query_length()]).to(trainer.accelerator.device))
            responses.append(trainer.generate(queries[-1], return_prompt=False, max_new_tokens=length(), min_length=-1, top_k=0, top_p=1.0,
                                              do_sample=True, pad_token_id=tokenizer.eos_token_id)[0])
            with torch.no_grad():
                scores.append(judge(torch.cat([queries[-1], responses[-1]])[None]).logits[0, 0])
        yield queries, responses, scores


files, config = HfArgumentParser((Files, PPOConfig)).parse_args_into_dataclasses()
torch.manual_seed(config.seed)
tokenizer = AutoTokenizer.from_pretrained(files.model_name_or_path)
policy, reference = (AutoModelForCausalLMWithValueHead.from_pretrained(path) for path in (files.model_name_or_path, files.ref_model or files.model_name_or_path))
trainer = PPOTrainer(config, policy, reference, tokenizer)
os.makedirs(files.output_dir, exist_ok=True)
with open(files.output_dir + "/stats_all.jsonl", "w") as log:
    for step, (queries, responses, scores) in enumerate(islice(stored_rollouts() if files.rollouts else live_rollouts(), files.max_steps), 1):
        stats = trainer.step(queries, responses, scores)
        shown = {key: float(value) for key, value in stats.items() if getattr(value, "ndim", 0) == 0}
        shown["env/reward_mean"] = torch.stack(list(scores)).mean().item()
        if trainer.accelerator.is_main_process:
            log.write(json.dumps(shown) + "\n")
            print("ppo: step %d/%d" % (step, files.max_steps), *("%s %.4g" % (k, shown[k]) for k in ("env/reward_mean", "objective/kl", "ppo/loss/total")), sep="  ")
if trainer.accelerator.is_main_process:
    trainer.accelerator.unwrap_model(policy).save_pretrained(files.output_dir)
    tokenizer.save_pretrained(files.output_dir)
