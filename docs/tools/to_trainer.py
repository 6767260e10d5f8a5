#!/usr/bin/env python3
"""to_trainer.py -- makes a checkpoint of align.c one that transformers' Trainer, and so TRL, resumes as its own.

    python docs/tools/to_trainer.py FLAGS --resume_from_checkpoint DIR/checkpoint-N

FLAGS are those of the run, as trl takes them. Writes optimizer.pt and scheduler.pt into the folder: AdamW's moments
from its optimizer.safetensors, the schedule at its step. Without them a Trainer starts from the weights and the step,
but with no moments and with the schedule at its beginning. Of an adapter it converts nothing.
"""
import json
import warnings

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments

args, *_ = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(return_remaining_strings=True)
folder = args.resume_from_checkpoint
state, moments = json.load(open(folder + "/trainer_state.json")), load_file(folder + "/optimizer.safetensors")
step = state["global_step"]
ranks = "ForSequenceClassification" in json.load(open(folder + "/config.json"))["architectures"][0]
model = (AutoModelForSequenceClassification if ranks else AutoModelForCausalLM).from_pretrained(folder)
trainer = Trainer(model, args)
trainer.create_optimizer_and_scheduler(state["max_steps"])
for name, weight in model.named_parameters():
    saved = {m: moments[m + "." + name.removeprefix("transformer.")] for m in ("exp_avg", "exp_avg_sq")}
    trainer.optimizer.state[weight] = {"step": torch.tensor(float(step)), **saved}
with warnings.catch_warnings():          # torch wants an optimizer's step before each of the schedule's
    warnings.simplefilter("ignore")
    for _ in range(step):
        trainer.lr_scheduler.step()
torch.save(trainer.optimizer.state_dict(), folder + "/optimizer.pt")
torch.save(trainer.lr_scheduler.state_dict(), folder + "/scheduler.pt")
print("%s: step %d, learning rate %.9g" % (folder, step, trainer.lr_scheduler.get_last_lr()[0]))
