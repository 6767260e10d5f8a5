#!/usr/bin/env python3
"""roundtrip.py - the files of align.c and the libraries whose formats they have, in both directions.

    python3 docs/tools/roundtrip.py [--align ./align] [--trl-python /tmp/venv_trl011/bin/python] [--spoil]

align writes small models, adapters, heads and logs; transformers, PEFT and TRL load them and must compute the same
numbers ("align >").  Then the libraries save models of random weights; align reads them and must compute the same
numbers ("> align").  A line for each check with the greatest difference found; at the end 'N passed, N failed'; exit
status 1 if any failed.  Nothing is downloaded.  It takes about a minute.

--spoil changes every folder a little on its way from one program to the other (weights 3 % larger, three merges
fewer, another end token, other steps): then every check must fail, and the last line begins with '0 passed'.

VERSIONS
    python3 -m venv /tmp/venv_roundtrip
    /tmp/venv_roundtrip/bin/pip install torch==2.13.0           # first and alone
    /tmp/venv_roundtrip/bin/pip install transformers==5.23.0 peft==0.21.2 safetensors datasets==5.2.0
TRL 0.11.4, the last with the course's PPOTrainer, does not work with transformers 5: the value head is checked in a
second Python, --trl-python, and all but trainer_state.json once more, with transformers 4.45.2.  The top of
docs/tools/golden.py says how to make it; torch and PEFT come from the first Python:
    echo /tmp/venv_roundtrip/lib/python3*/site-packages > /tmp/venv_trl011/lib/python3.11/site-packages/first.pth
"""
import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
warnings.filterwarnings("ignore")
try:
    import torch
    import transformers
    import peft
    import datasets
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file, save_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, TrainerState
except ImportError as error:
    sys.exit("roundtrip.py: %s (in %s). The top of this file says what to install." % (error, sys.executable))

REVIEWS = Path(__file__).resolve().parent.parent / "reviews.jsonl"
FROM_BASE = ["--model_name_or_path", "base", "--dataset_name"]
SHAPE = dict(vocab_size=513, n_layer=2, n_embd=32, n_head=2, n_positions=32)
TEXTS = ["The film is good.", " a film  with   spaces ", "It's what they'll say; I'd've gone, we're HERE'S", "x", "aaaaaaaaaaaaaaaa",
         "Não é mau: coração, naïve, Æsir", "你好 नमस्ते 😀‍❤️ e\u0301", "line\nline\r\n\n\ttab\u00a0nbsp\u2003em  ",
         "3.14159 in 2024, 1/2 ½ ٣ 100% $5 <br /><br />", "!?...--''\"\"''s", "\x00\x7f\ufffd"]
SPOILS = {"merges.txt": (r"(?s)^(#.*?\n)(.*?\n){3}", r"\1"), "config.json": ('("eos_token_id": )13', r"\g<1>262"),
          "tokenizer_config.json": (r'endoftext|(?<="eos_token": ")\.', "end"),
          "trainer_state.json": (r'("(global_step|step|ppo/loss/total)": -?)', r"\g<1>1")}
passed = failed = 0


def check(name, difference, limit=1e-4):
    """The limit 1e-4 is for log-probabilities (nats), rewards and values."""
    global passed, failed
    ok = difference <= limit                   # False for nan
    passed, failed = passed + ok, failed + (not ok)
    print("%-4s %8.2g  %s" % ("ok" if ok else "FAIL", difference, name), flush=True)


def worst(pairs):
    """The greatest |a - b| over pairs of numbers, lists or tensors; infinite where shapes differ, nan if any is."""
    most = 0.0
    for a, b in pairs:
        a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
        difference = math.inf if a.shape != b.shape else (a - b).abs().max().item() if a.numel() else 0.0
        most = difference if math.isnan(difference) or difference > most else most
    return most


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


def jsonl(file, items):
    Path(file).write_text("".join(json.dumps(item) + "\n" for item in items))
    return file


def align(*args):
    p = subprocess.run([opt.align, *map(str, args), "--quiet"], capture_output=True, encoding="utf-8")
    if p.returncode:
        raise RuntimeError("align %s\n%s" % (" ".join(map(str, args)), p.stderr))
    return p.stdout


def train(command, folder, *args, steps=6):
    """align COMMAND, some steps at a rate that moves the weights; returns the folder that it wrote."""
    align(command, "--output_dir", folder, "--max_steps", steps, "--learning_rate", 1e-2, "--logging_steps", 1, *args)
    return folder


def ask(command, folder, *args):
    """align logprob or align score, on TEXTS."""
    return rows(align(command, "--model_name_or_path", folder, "--dataset_name", "texts.jsonl", *args))


def handed(folder):
    """The folder as the other program gets it: as it is, or with --spoil a copy with something wrong in each file."""
    if not opt.spoil:
        return folder
    copy = Path(shutil.copytree(folder, tempfile.mkdtemp(dir="."), dirs_exist_ok=True))
    for file in copy.rglob("*.*"):
        if file.suffix == ".safetensors":
            save_file({k: (1.03 * v.float()).to(v.dtype) for k, v in load_file(file).items()}, file, {"format": "pt"})
        elif file.suffix == ".jsonl":
            file.write_text('{"text": "spoilt"}\n' + file.read_text(encoding="utf-8"), encoding="utf-8")
        elif file.name in SPOILS:
            file.write_text(re.sub(*SPOILS[file.name], file.read_text(encoding="utf-8")), encoding="utf-8")
    return str(copy)


@torch.no_grad()
def randomized(model):
    """Every trainable weight moved by N(0, 0.2), and no dropout: a model far from even odds, with biases that matter."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def logprobs_of(model, ids):
    out = model(torch.tensor([ids]))
    logits = out[0] if isinstance(out, tuple) else out.logits
    return logits[0, :-1].double().log_softmax(-1).gather(1, torch.tensor(ids[1:]).view(-1, 1)).view(-1)


def same_logprobs(name, lines, model):
    """Lines of `align logprob` against the model."""
    check(name + ": log-probabilities", worst((r["token_logprobs"], logprobs_of(model, r["input_ids"])) for r in lines))


@torch.no_grad()
def same_rewards(name, lines, model):
    """Lines of `align score` against the model, one text at a time: nothing is padded."""
    tok = AutoTokenizer.from_pretrained("base")
    ids = [torch.tensor([tok(r["text"])["input_ids"][:SHAPE["n_positions"]]]) for r in lines]
    check(name + ": rewards", worst(([[r["reward"]]], model(i).logits) for r, i in zip(lines, ids)))


def language_model():
    model = AutoModelForCausalLM.from_pretrained(handed("base")).eval()
    same_logprobs("language model, align > AutoModelForCausalLM", ask("logprob", "base"), model)
    for kind, dtype, size in (("float32", torch.float32, "1GB"), ("several files", torch.float32, "30KB"),
                              ("bfloat16", torch.bfloat16, "1GB"), ("float16", torch.float16, "1GB")):
        model = randomized(transformers.GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=512, eos_token_id=512))).to(dtype)
        model.save_pretrained(kind, max_shard_size=size)
        AutoTokenizer.from_pretrained("base").save_pretrained(kind)
        same_logprobs("language model, GPT2LMHeadModel, %s > align" % kind, ask("logprob", handed(kind)), model.float())


def beside_the_base(kind):
    """Configuration and vocabulary of the base in a folder whose weights are written by hand."""
    os.makedirs(kind, exist_ok=True)
    AutoModelForCausalLM.from_pretrained("base").config.save_pretrained(kind)
    AutoTokenizer.from_pretrained("base").save_pretrained(kind)
    return kind


def output_layer():
    """The output layer as files hold it: only lm_head (safetensors' save_model keeps the first of two names), both and
    equal, untied but equal; and the names that torch.compile and DataParallel write."""
    model = randomized(AutoModelForCausalLM.from_pretrained("base"))
    kinds = {}
    save_model(model, beside_the_base("head_only") + "/model.safetensors", {"format": "pt"})
    kinds["only lm_head, safetensors' save_model"] = "head_only"
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, beside_the_base("head_both") + "/model.safetensors", {"format": "pt"})
    kinds["wte and lm_head, equal"] = "head_both"
    model.config.save_pretrained(beside_the_base("head_twice"))
    save_file(state, "head_twice/model.safetensors", {"format": "pt"})
    settings = json.loads(Path("head_twice/config.json").read_text())
    Path("head_twice/config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    kinds["tie_word_embeddings false, equal"] = "head_twice"
    for wrap, folder in ((torch.compile, "compiled"), (torch.nn.DataParallel, "parallel"), (lambda m: torch.nn.DataParallel(torch.compile(m)), "parallel_compiled")):
        save_file({k: v.clone() for k, v in wrap(model).state_dict().items()}, beside_the_base(folder) + "/model.safetensors", {"format": "pt"})
        kinds[folder] = folder
    for name, folder in kinds.items():
        same_logprobs("output layer and names, %s > align" % name, ask("logprob", handed(folder)), model)
    for name in ("head_only", "head_both", "head_twice"):
        same_logprobs("output layer, %s, the library's own reading" % name, ask("logprob", handed(name)), AutoModelForCausalLM.from_pretrained(name).eval())


@torch.no_grad()
def same_sentiment(name, lines, model, labels):
    """Lines of `align score` against the text-classification pipeline; `labels`: negative, positive."""
    tok = AutoTokenizer.from_pretrained("base")
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tok, function_to_apply="softmax", top_k=None)
    told = [{x["label"]: x["score"] for x in pipe([r["text"]], truncation=True, max_length=SHAPE["n_positions"])[0]} for r in lines]
    ours = [{x["label"]: x["score"] for x in r["pipe_outputs"]} for r in lines]
    check(name + ": the pipeline's scores", worst(([o["NEGATIVE"], o["POSITIVE"]], [t[labels[0]], t[labels[1]]]) for o, t in zip(ours, told)))
    logits = [model(torch.tensor([tok(r["text"])["input_ids"][:SHAPE["n_positions"]]])).logits[0] for r in lines]
    positive = model.config.label2id[labels[1]]
    check(name + ": rewards", worst((r["reward"], x[positive] - x[1 - positive]) for r, x in zip(lines, logits)))


def two_labels():
    """transformers' default of two labels, in either order, under names that say which is positive and names that do not."""
    for labels in (["NEGATIVE", "POSITIVE"], ["POSITIVE", "NEGATIVE"], ["LABEL_0", "LABEL_1"]):
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        model = randomized(transformers.GPT2ForSequenceClassification(GPT2Config(**SHAPE, **names, bos_token_id=512, eos_token_id=512, pad_token_id=512)))
        folder = "labels_" + labels[0]
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained("base").save_pretrained(folder)
        order = labels if labels[0] != "POSITIVE" else labels[::-1]
        same_sentiment("two labels, %s first > align" % labels[0], ask("score", handed(folder)), model, order)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)
    model = randomized(get_peft_model(AutoModelForSequenceClassification.from_pretrained("base", num_labels=2), config))
    model.save_pretrained("saved_lora_labels")
    same_sentiment("two labels, LoRA, get_peft_model > align", ask("score", "base", "--peft_adapter", handed("saved_lora_labels")), model.merge_and_unload(), ["LABEL_0", "LABEL_1"])
    train("reward", "labels_on", "--model_name_or_path", "labels_NEGATIVE", "--dataset_name", REVIEWS)
    same_rewards("two labels trained further, align > AutoModelForSequenceClassification", ask("score", "labels_on"), AutoModelForSequenceClassification.from_pretrained(handed("labels_on")).eval())


def tokenizer():
    train("pretrain", "wide", "--dataset_name", REVIEWS, "--n_layer", 1, "--n_embd", 8, "--n_head", 1, "--n_positions", 32, steps=1)
    forged = ["<|endoftext|>", "a<|endoftext|>b <|endoftext|>\n"]
    jsonl("forged.jsonl", [{"text": t} for t in TEXTS + forged])
    for folder, V in (("base", 513), ("wide", 50257)):
        tok, name = AutoTokenizer.from_pretrained(handed(folder)), "tokenizer of %d ids, align > AutoTokenizer: " % V
        ids = [r["input_ids"] for r in rows(align("tokenize", "--jsonl", "--vocab_size", V, "forged.jsonl"))]
        check(name + "texts that differ, of %d" % len(TEXTS), sum(tok(t)["input_ids"] != i for t, i in zip(TEXTS, ids)), 0)
        cut = [r["input_ids"] for r in ask("logprob", folder)]
        check(name + "input_ids of logprob that differ", sum(tok(t)["input_ids"][:32] != i for t, i in zip(TEXTS, cut)), 0)
        check(name + "id of the end, size", worst([([tok.eos_token_id, tok.pad_token_id, len(tok)], [V - 1, V - 1, V])]), 0)
        # In align <|endoftext|> is ordinary text; transformers takes it so only when it is told to.
        same = [tok(t, split_special_tokens=True)["input_ids"] == i != tok(t)["input_ids"] for t, i in zip(forged, ids[len(TEXTS):])]
        check(name + "texts with <|endoftext|> that differ from split_special_tokens", same.count(False), 0)


def end_token():
    """A model that ends its texts in an ordinary token, "." (13), and one with an added padding token."""
    shutil.copytree("base", "dotted")
    config = json.loads(Path("base/config.json").read_text())
    Path("dotted/config.json").write_text(json.dumps({**config, "eos_token_id": 13, "pad_token_id": 13}))
    one = jsonl("one.jsonl", [{"prompt": "The film is", "completion": " good"}])
    train("sft", "ended", "--model_name_or_path", "dotted", "--dataset_name", one, steps=40)
    tok, model = AutoTokenizer.from_pretrained(handed("ended")), AutoModelForCausalLM.from_pretrained(handed("ended")).eval()
    name = "end token 13, align sft > "
    ids = [model.config.eos_token_id, tok.eos_token_id, tok.pad_token_id, len(tok)]
    check(name + "AutoTokenizer, config: ids of the end and of padding, size", worst([(ids, [13, 13, 13, 513])]), 0)
    texts = TEXTS + ["a... b.c. ", "."]
    jsonl("dots.jsonl", [{"text": t} for t in texts])
    want = [r["input_ids"] for r in rows(align("tokenize", "--jsonl", "--vocab_size", 513, "dots.jsonl"))]
    check(name + "AutoTokenizer: texts that differ, of %d" % len(texts), sum(tok(t)["input_ids"] != i for t, i in zip(texts, want)), 0)
    prompt = torch.tensor([tok("The film is")["input_ids"]])
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)[0, prompt.shape[1]:].tolist()
    ours = rows(align("generate", "--model_name_or_path", "ended", "--prompt", "The film is", "--json", "--max_new_tokens", 12))[0]["sequences"][0]
    check(name + "generate: %d tokens, the last of them 13" % len(ours), worst([(ours, theirs), ([ours[-1], len(ours) < 12], [13, 1])]), 0)
    tok, model = AutoTokenizer.from_pretrained("wide"), AutoModelForCausalLM.from_pretrained("wide")
    tok.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tok))
    model.config.pad_token_id = tok.pad_token_id
    model.save_pretrained("padding")
    tok.save_pretrained("padding")
    for folder, after in (("padding", "padding_1"), ("padding_1", "padding_2")):
        train("sft", after, "--model_name_or_path", folder, "--dataset_name", one, steps=1)
        tok, config = AutoTokenizer.from_pretrained(handed(after)), transformers.AutoConfig.from_pretrained(after)
        ids = [tok.convert_tokens_to_ids("[PAD]"), tok.pad_token_id, config.pad_token_id, tok.eos_token_id, len(tok)]
        check("[PAD] added by transformers, %s > AutoTokenizer: ids, size" % after, worst([(ids, [50257, 50257, 50257, 50256, 50258])]), 0)


def reward_model():
    model = AutoModelForSequenceClassification.from_pretrained(handed("reward")).eval()
    same_rewards("reward model, align > AutoModelForSequenceClassification", ask("score", "reward"), model)
    config = GPT2Config(**SHAPE, num_labels=1, bos_token_id=512, eos_token_id=512, pad_token_id=512)
    model = randomized(transformers.GPT2ForSequenceClassification(config))
    model.save_pretrained("saved_reward")
    AutoTokenizer.from_pretrained("base").save_pretrained("saved_reward")
    same_rewards("reward model, GPT2ForSequenceClassification > align", ask("score", handed("saved_reward")), model)


def lora():
    for command, data, args in (("sft", REVIEWS, ["c_attn", "c_proj"]), ("dpo", "pairs.jsonl", ["attn.c_proj", "mlp.c_fc", "--use_rslora"])):
        name, folder, merged = "LoRA, align %s %s > " % (command, " ".join(args)), "lora_" + command, "merged_" + command
        train(command, folder, *FROM_BASE, data, "--use_peft", "--lora_r", 4, "--lora_target_modules", *args)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), handed(folder)).eval()
        same_logprobs(name + "PeftModel", ask("logprob", "base", "--peft_adapter", folder), model)
        align("merge", "--model_name_or_path", "base", "--peft_adapter", folder, "--output_dir", merged)
        ours, theirs = load_file(merged + "/model.safetensors"), model.merge_and_unload().state_dict()
        theirs.pop("lm_head.weight")           # the same tensor as wte
        same_names = ours.keys() == theirs.keys()
        check(name + "merge_and_unload: weights", worst((ours[k], theirs[k]) for k in ours) if same_names else math.inf, 1e-6)
    for targets, rslora in ((["c_attn", "c_proj"], False), (["mlp.c_proj", "c_fc"], True), ("all-linear", False),
                            (r".*\.[01]\.attn\.c_.*", False)):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, fan_in_fan_out=True)
        model = randomized(get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config))
        model.save_pretrained("saved_lora")
        name = "LoRA, get_peft_model %s%s > align" % (targets, " use_rslora" * rslora)
        same_logprobs(name, ask("logprob", "base", "--peft_adapter", handed("saved_lora")), model)
    same_logprobs("LoRA, get_peft_model > align, the adapter's folder alone", ask("logprob", handed("saved_lora")), model)
    for settings in (dict(layers_to_transform=[1]), dict(layers_to_transform=[0], layers_pattern="h"), dict(exclude_modules=["mlp.c_proj", "h.0.attn.c_attn"]),
                     dict(modules_to_save=["lm_head"])):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **settings)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config)
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)  # what modules_to_save copies stays as it is
        randomized(model).save_pretrained("saved_partial")
        same_logprobs("LoRA, get_peft_model %s > align" % settings, ask("logprob", "base", "--peft_adapter", handed("saved_partial")), model)
        align("sft", *FROM_BASE, REVIEWS, "--peft_adapter", "saved_partial", "--max_steps", 1, "--learning_rate", 1e-30, "--output_dir", "partial_on")
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), handed("partial_on")).eval()
        same_logprobs("LoRA, %s, trained on, align > PeftModel" % settings, ask("logprob", "base", "--peft_adapter", "partial_on"), again)
        shutil.rmtree("partial_on")


def lora_reward_model():
    load = lambda: AutoModelForSequenceClassification.from_pretrained("base", num_labels=1)             # noqa: E731
    train("reward", "lora_reward", *FROM_BASE, REVIEWS, "--use_peft", "--lora_target_modules", "c_attn", "c_proj")
    model = PeftModel.from_pretrained(load(), handed("lora_reward")).eval()
    same_rewards("LoRA reward model, align > PeftModel", ask("score", "base", "--peft_adapter", "lora_reward"), model)
    align("merge", "--model_name_or_path", "lora_reward", "--output_dir", "merged_reward")
    same_rewards("LoRA reward model, align merge > merge_and_unload", ask("score", "merged_reward"), model.merge_and_unload())
    model = randomized(get_peft_model(load(), LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)))
    model.save_pretrained("saved_lora_reward")
    same_rewards("LoRA reward model, get_peft_model > align", ask("score", "base", "--peft_adapter", handed("saved_lora_reward")), model)


SPLIT_FOLDERS = [["train.jsonl", "validation.jsonl"], ["training.jsonl", "data_test.jsonl"], ["my train.jsonl", "my eval.jsonl"],
                 ["train.jsonl", "train_2.jsonl", "val.jsonl", "test.jsonl"], ["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl", "old_train.jsonl"],
                 ["sub/train.jsonl", "sub/dev.jsonl"], ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"],
                 ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl", "train_old.jsonl"],
                 ["a.jsonl", "b.jsonl"], ["trainer.jsonl", "tests.jsonl"]]


def data_splits():
    """A folder of data: align trains on the rows of load_dataset's train split, and holds out those of its validation or
    test split. Of the latter align says no more than the loss: it must be that of a file with load_dataset's rows."""
    for number, names in enumerate(SPLIT_FOLDERS):
        folder, name = Path("splits_%d" % number), "data, %s > align: " % ", ".join(names)
        for i, file in enumerate(names):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            jsonl(folder / file, [{"text": "Row %d of a file, the number %d." % (k, i)} for k in range(3)])
        splits = datasets.load_dataset(str(handed(folder)), cache_dir="cache")
        ours = rows(align("score", "--model_name_or_path", "reward", "--dataset_name", folder))
        check(name + "rows of the train split", [r["text"] for r in ours] != list(splits["train"]["text"]), 0)
        held_out = splits.get("validation", splits.get("test"))
        if held_out is None:
            continue
        jsonl("held_out.jsonl", [{"text": text} for text in held_out["text"]])
        loss = []
        for eval_dataset in (folder, "held_out.jsonl"):
            state = Path(train("sft", "splits_out", *FROM_BASE, folder, "--eval_dataset", eval_dataset, steps=1), "trainer_state.json")
            loss += [h["eval_loss"] for h in json.loads(state.read_text())["log_history"] if "eval_loss" in h]
        check(name + "eval_loss on the %s split" % held_out.split, abs(loss[0] - loss[1]), 0)


def trainer_state():
    """transformers 5 alone reads it: 4.45 knows no "best_global_step".  The lab plots loss against step or epoch; PPO's
    curves are in stats_all."""
    steps = 6
    for command, args in (("sft", [REVIEWS, "--eval_dataset", "few.jsonl"]), ("reward", [REVIEWS]), ("dpo", ["pairs.jsonl"]),
                          ("ppo", [REVIEWS, "--reward_model_path", "reward", "--batch_size", 4, "--mini_batch_size", 4])):
        folder, name = train(command, "state_" + command, *FROM_BASE, *args, steps=steps), "trainer_state.json of %s > TrainerState: " % command
        state = TrainerState.load_from_json(handed(folder) + "/trainer_state.json")
        check(name + "global_step, max_steps", worst([([state.global_step, state.max_steps], [steps, steps])]), 0)
        if command == "ppo":
            stats = rows(Path(folder, "stats_all.jsonl").read_text())
            loss = [[h["ppo/loss/total"] for h in log] for log in (state.log_history, stats)]
            check(name + "ppo/loss/total", worst([loss]), 0)
            continue
        curve = [(h["epoch"], h["step"], h["loss"]) for h in state.log_history if {"loss", "step", "epoch"} <= h.keys()]
        growing = curve == sorted(curve) and all(epoch > 0 and math.isfinite(loss) for epoch, _step, loss in curve)
        check(name + "loss, step, epoch", worst([([step for _epoch, step, _loss in curve], range(1, steps + 1))]) if growing else math.inf, 0)
        if command == "sft":
            evaluated = [h["step"] for h in state.log_history if {"eval_loss", "step", "epoch"} <= h.keys()]
            check(name + "eval_loss, step, epoch", worst([(evaluated, [steps])]), 0)


def checkpoints():
    """A folder checkpoint-N is a model with a log; its moments have torch's names. That transformers' Trainer goes on
    from it is checked by docs/tools/check_outgrow.py."""
    flags = [*FROM_BASE, REVIEWS, "--per_device_train_batch_size", 4, "--train_sampling_strategy", "sequential", "--save_steps", 1]
    folder = train("sft", "saved", *flags)
    shutil.copytree("saved/checkpoint-6", "last")
    same_logprobs("checkpoint-6, align > AutoModelForCausalLM", ask("logprob", folder), AutoModelForCausalLM.from_pretrained(handed("last")).eval())
    state = TrainerState.load_from_json(handed("saved/checkpoint-2") + "/trainer_state.json")
    check("checkpoint-2 > TrainerState: global_step, entries", worst([([state.global_step, len(state.log_history)], [2, 2])]), 0)
    first = handed("saved/checkpoint-1")       # after one step exp_avg is 0.1 d, exp_avg_sq 0.001 d^2
    names, moments = load_file(first + "/model.safetensors"), load_file(first + "/optimizer.safetensors")
    rest = ((moments["exp_avg." + n.replace("transformer.", "")] / 0.1, (moments["exp_avg_sq." + n.replace("transformer.", "")] / 0.001).sqrt()) for n in names)
    check("checkpoint-1, optimizer.safetensors: moments of every weight", worst(((m.abs() / m.abs().max(), v / m.abs().max()) for m, v in rest)), 1e-3)
    train("reward", "saved_reward_steps", "--model_name_or_path", "reward", "--dataset_name", REVIEWS, "--save_steps", 6)
    same_rewards("checkpoint-6 of a reward model > AutoModelForSequenceClassification", ask("score", "saved_reward_steps"),
                 AutoModelForSequenceClassification.from_pretrained(handed("saved_reward_steps/checkpoint-6")).eval())
    train("sft", "lora_steps", *flags, "--use_peft", "--lora_r", 4)
    same_logprobs("checkpoint-6 of an adapter > PeftModel", ask("logprob", "base", "--peft_adapter", "lora_steps"),
                  PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), handed("lora_steps/checkpoint-6")).eval())


@torch.no_grad()
def same_values(name, folder, model, rollouts):
    """What align's statistics say of the values and log-probabilities of responses, 4 a step, against TRL's model."""
    align("ppo", "--model_name_or_path", folder, "--rollouts", jsonl("rollouts.jsonl", rollouts), "--output_dir", "replayed",
          "--batch_size", 4, "--mini_batch_size", 4, "--max_steps", len(rollouts) // 4, "--learning_rate", 1e-30)
    stats, pairs = rows(Path("replayed/stats_all.jsonl").read_text()), []
    for step, s in enumerate(stats):
        values, surprise = [], 0
        for r in rollouts[4 * step:4 * step + 4]:
            ids, first = r["query_ids"] + r["response_ids"], len(r["query_ids"]) - 1
            values.append(model(torch.tensor([ids]))[2][0, first:-1].double())
            surprise -= logprobs_of(model, ids)[first:].sum() / 4
        values = torch.cat(values)
        pairs.append(([s["ppo/val/mean"], s["ppo/val/var"], s["objective/entropy"]], [values.mean(), values.var(), surprise]))
    check(name + ": ppo/val/mean, ppo/val/var, objective/entropy of %d steps" % len(stats), worst(pairs))


def value_head():
    """TRL 0.11.4's own class, in the second Python; the policy is a model, then a LoRA adapter."""
    from trl import AutoModelForCausalLMWithValueHead
    for name, folder, args in (("value head", "ppo", []), ("value head, LoRA", "ppo_lora", ["--use_peft"])):
        train("ppo", folder, *FROM_BASE, REVIEWS, "--reward_model_path", "reward", "--batch_size", 8, "--mini_batch_size", 4, *args, steps=2)
        rollouts, written = rows(Path(folder, "rollouts.jsonl").read_text()), load_file(folder + "/model.safetensors")
        model = AutoModelForCausalLMWithValueHead.from_pretrained(handed(folder), is_trainable=True).eval()
        head, to = model.v_head.summary, name + ", align > TRL"
        weight, bias = written["v_head.summary.weight"], written["v_head.summary.bias"]
        check(to + ": v_head.summary, bit for bit", worst([(head.weight.detach(), weight), (head.bias.detach(), bias)]), 0)
        same_logprobs(to, ask("logprob", folder), model)
        ids = torch.tensor([rollouts[0]["query_ids"] + rollouts[0]["response_ids"]])
        with torch.no_grad():
            hidden = model.pretrained_model(ids, output_hidden_states=True).hidden_states[-1]
            check(to + ": values by hand", worst([(model(ids)[2], (hidden @ weight.T + bias)[:, :, 0])]))
        same_values(to, folder, model, rollouts)
        back = "saved_" + folder
        os.makedirs(back)                      # TRL does not make it
        randomized(model).save_pretrained(back)
        if args:                               # beside an adapter TRL saves the head as a pickle, which align does not read
            save_file(torch.load(back + "/pytorch_model.bin", weights_only=True), back + "/model.safetensors")
        same_values(name + ", TRL > align", handed(back), model, rollouts)


def second_python():
    """This script in the Python that has TRL; its lines are shown, its counts added."""
    global passed, failed
    if not shutil.which(opt.trl_python):
        raise FileNotFoundError("no %s; the top of docs/tools/golden.py says how to make it" % opt.trl_python)
    command = [opt.trl_python, __file__, "--with-trl", "--align", opt.align, *["--spoil"] * opt.spoil]
    p = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    shown, passed_there, failed_there = re.fullmatch(r"(?s)(.*?)(?:(\d+) passed, (\d+) failed\n)?", p.stdout).groups()
    print(shown, end="")
    if not passed_there:
        raise RuntimeError("%s stopped with exit status %d" % (opt.trl_python, p.returncode))
    passed, failed = passed + int(passed_there), failed + int(failed_there)


def prepare():
    texts = [r["text"] for r in rows(REVIEWS.read_text(encoding="utf-8")) if len(r["text"]) < 50][:40]
    jsonl("texts.jsonl", [{"text": t} for t in TEXTS])
    jsonl("few.jsonl", [{"text": t} for t in texts[:8]])
    jsonl("pairs.jsonl", [{"prompt": t[:8], "chosen": t[8:], "rejected": texts[i - 1][8:]} for i, t in enumerate(texts)])
    train("pretrain", "base", "--dataset_name", REVIEWS, *(x for k, v in SHAPE.items() for x in ("--" + k, v)), steps=30)
    train("reward", "reward", *FROM_BASE, REVIEWS)


def main():
    print("torch %s, transformers %s, peft %s, datasets %s" % (torch.__version__, transformers.__version__, peft.__version__, datasets.__version__), flush=True)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    prepare()
    here_only = [value_head] if opt.with_trl else [trainer_state, checkpoints, second_python]
    for part in [language_model, output_layer, tokenizer, end_token, reward_model, two_labels, lora,
                 lora_reward_model, data_splits] + here_only:
        try:
            part()
        except Exception:                      # the other parts are checked all the same
            check("%s stopped: %s" % (part.__name__, traceback.format_exc(limit=-1)), math.inf)
    print("%d passed, %d failed" % (passed, failed))


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description="align's files and the libraries they are for (see the top of this file)")
    ap.add_argument("--align", default="./align", help="the program")
    ap.add_argument("--trl-python", default="/tmp/venv_trl011/bin/python", help="Python with trl 0.11.4")
    ap.add_argument("--spoil", action="store_true", help="see every check fail")
    ap.add_argument("--with-trl", action="store_true", help="this is the Python with trl (used internally)")
    opt = ap.parse_args()
    if not shutil.which(opt.align):
        sys.exit("roundtrip.py: no program %s; make builds it" % opt.align)
    opt.align, opt.trl_python, __file__ = (os.path.abspath(name) for name in (opt.align, opt.trl_python, __file__))
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        main()
        os.chdir("/")
    sys.exit(failed > 0)
