#!/usr/bin/env python3
"""grpo_trl.py -- GRPO and RLOO with the flags, folders and files of `align grpo` and `align
reinforce`, by TRL 1.16's GRPOTrainer and RLOOTrainer.

    python docs/tools/grpo_trl.py grpo --model_name_or_path DIR --output_dir DIR ... with one of
        --reward_model_path DIR --dataset_name FILE     it answers prompts and is judged
        --rollouts FILE                                 learns from stored answers, in their order

    python docs/tools/grpo_trl.py reinforce ...         the same for RLOO

The other flags are GRPOConfig's, RLOOConfig's and ModelConfig's (--use_peft ...). On several GPUs:
accelerate launch docs/tools/grpo_trl.py ..., on prompts.
"""

import json
import sys
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Optional
from unittest.mock import patch

from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer, ModelConfig, RLOOConfig, RLOOTrainer, get_peft_config
from trl.trainer import grpo_trainer, rloo_trainer


@dataclass
class Files:
    ref_model: Optional[str] = None  # default: the start model
    reward_model_path: Optional[str] = None
    dataset_name: Optional[str] = None  # JSON Lines with `prompt`
    rollouts: Optional[str] = None  # JSON Lines with `query_ids`, `response_ids`, `score`
    peft_adapter: Optional[str] = None  # go on with one; its reference is a copy
    baseline: str = "rloo"  # of `align reinforce`; TRL has no other


def read(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def replaying(trainer_class, module, rows):
    """The trainer that takes stored answers in place of its own, and leaves them in their order:
    TRL shuffles the answers of a step before it cuts them into micro-batches."""
    rows = cycle(rows)

    class Replay(trainer_class):
        def _prepare_inputs(self, batch):
            with patch.object(module, "shuffle_sequence_dict", lambda batch: batch):
                return super()._prepare_inputs(batch)

        def _tokenize_prompts(self, prompts):
            self.rollouts = list(islice(rows, len(prompts)))
            return [row["query_ids"] for row in self.rollouts], None, {}

        def _generate_single_turn(self, *arguments, **keywords):
            answers = [row["response_ids"] for row in self.rollouts]
            return (answers, None) if trainer_class is GRPOTrainer else answers

        def stored_score(self, completions, **columns):
            return [row["score"] for row in self.rollouts]

    return Replay


def main(words):
    """words: those of the command line, of which the first is grpo or reinforce."""
    is_grpo = words[0] == "grpo"
    module, trainer_class, config_class = (
        (grpo_trainer, GRPOTrainer, GRPOConfig)
        if is_grpo
        else (rloo_trainer, RLOOTrainer, RLOOConfig)
    )
    parser = HfArgumentParser((Files, config_class, ModelConfig))
    # the answers of a step, as `align reinforce` calls them
    other_name = {"--batch_size": "--per_device_train_batch_size"}
    words = [other_name.get(word, word) for word in words]
    files, config, model = parser.parse_args_into_dataclasses(words[1:])
    if files.baseline != "rloo":
        sys.exit("--baseline %s: TRL has rloo alone" % files.baseline)
    config.model_init_kwargs = {"dtype": model.dtype}

    # 1. Who scores: the stored rollouts, or the reward model.
    judge = files.reward_model_path
    if files.rollouts:
        rows = read(files.rollouts)
        trainer_class = replaying(trainer_class, module, rows)
        prompts = ["a stored prompt"] * (len(rows) // config.num_generations)

        def judge(completions, **columns):
            return trainer.stored_score(completions)

    else:
        prompts = [row["prompt"] for row in read(files.dataset_name)]

    # 2. The training.
    policy = model.model_name_or_path
    if files.peft_adapter:
        policy = AutoModelForCausalLM.from_pretrained(policy, dtype=model.dtype)
        policy = PeftModel.from_pretrained(policy, files.peft_adapter, is_trainable=True)
        config.model_init_kwargs = None
    trainer = trainer_class(
        model=policy,
        reward_funcs=judge,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        peft_config=get_peft_config(model),
    )
    if files.ref_model and trainer.ref_model is not None:
        reference = AutoModelForCausalLM.from_pretrained(files.ref_model)
        trainer.ref_model.load_state_dict(reference.state_dict())
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)

    # 3. Model and log, where align has them.
    trainer.save_model(config.output_dir)
    trainer.save_state()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("grpo", "reinforce"):
        sys.exit(__doc__)
    main(sys.argv[1:])
