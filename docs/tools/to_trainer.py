#!/usr/bin/env python3
"""to_trainer.py -- makes a checkpoint of align.c one that transformers' Trainer resumes as its own.

    python docs/tools/to_trainer.py FLAGS --resume_from_checkpoint DIR/checkpoint-N

TRL's trainers are such Trainers. FLAGS are those of the run, as trl takes them. Writes optimizer.pt
and scheduler.pt into the folder: AdamW's moments from its optimizer.safetensors, the schedule at
its step. Without them a Trainer starts from the weights and the step, but with no moments and with
the schedule at its beginning. Of an adapter it converts nothing.
"""

import json
import warnings

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import HfArgumentParser, Trainer, TrainingArguments

parser = HfArgumentParser(TrainingArguments)
args, *_ = parser.parse_args_into_dataclasses(return_remaining_strings=True)
folder = args.resume_from_checkpoint
state = json.load(open(folder + "/trainer_state.json"))
moments = load_file(folder + "/optimizer.safetensors")
step = state["global_step"]
ranks = "ForSequenceClassification" in json.load(open(folder + "/config.json"))["architectures"][0]
loader = AutoModelForSequenceClassification if ranks else AutoModelForCausalLM
model = loader.from_pretrained(folder)
trainer = Trainer(model, args)
trainer.create_optimizer_and_scheduler(state["max_steps"])
for name, weight in model.named_parameters():
    name = name.removeprefix("transformer.")
    saved = {moment: moments[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")}
    trainer.optimizer.state[weight] = {"step": torch.tensor(float(step)), **saved}
with warnings.catch_warnings():  # torch wants an optimizer's step before each of the schedule's
    warnings.simplefilter("ignore")
    for _ in range(step):
        trainer.lr_scheduler.step()
torch.save(trainer.optimizer.state_dict(), folder + "/optimizer.pt")
torch.save(trainer.lr_scheduler.state_dict(), folder + "/scheduler.pt")
print("%s: step %d, learning rate %.9g" % (folder, step, trainer.lr_scheduler.get_last_lr()[0]))
