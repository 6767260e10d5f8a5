#!/usr/bin/env python3
"""roundtrip.py - the files of align.c and the libraries whose formats they have, both ways.

    python3 docs/tools/roundtrip.py [--align ./align] [--spoil]
                                    [--trl-python /tmp/venv_trl011/bin/python]

align writes small models, adapters, heads and logs; transformers, PEFT and TRL load them and must
compute the same numbers ("align >"). Then the libraries save models of random weights; align reads
them and must compute the same numbers ("> align"). A line for each check with the greatest
difference found; at the end 'N passed, N failed'; exit status 1 if any failed. Nothing is
downloaded. It takes about a minute.

--spoil changes every folder a little on its way from one program to the other (weights 3 % larger,
three merges fewer, another end token, other steps): then every check must fail, and the last line
begins with '0 passed'.

VERSIONS
    python3 -m venv /tmp/venv_roundtrip
    /tmp/venv_roundtrip/bin/pip install torch==2.13.0           # first and alone
    /tmp/venv_roundtrip/bin/pip install transformers==5.23.0 peft==0.21.2 safetensors \\
        datasets==5.2.0
TRL 0.11.4, the last with the course's PPOTrainer, does not work with transformers 5: the value head
is checked in a second Python, --trl-python, and all but trainer_state.json once more, with
transformers 4.45.2. The top of docs/tools/golden.py says how to make it; torch and PEFT come from
the first Python:
    echo /tmp/venv_roundtrip/lib/python3*/site-packages \\
        > /tmp/venv_trl011/lib/python3.11/site-packages/first.pth
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

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)
warnings.filterwarnings("ignore")
try:
    import torch
    import transformers
    import peft
    import datasets
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file, save_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers import AutoTokenizer, GPT2Config, TrainerState
except ImportError as error:
    message = "roundtrip.py: %s (in %s). The top of this file says what to install."
    sys.exit(message % (error, sys.executable))

REVIEWS = Path(__file__).resolve().parent.parent / "reviews.jsonl"
SHAPE = dict(vocab_size=513, n_layer=2, n_embd=32, n_head=2, n_positions=32)
ENDS = dict(bos_token_id=512, eos_token_id=512, pad_token_id=512)
TEXTS = [
    "The film is good.",
    " a film  with   spaces ",
    "It's what they'll say; I'd've gone, we're HERE'S",
    "x",
    "aaaaaaaaaaaaaaaa",
    "Não é mau: coração, naïve, Æsir",
    "你好 नमस्ते 😀‍❤️ e\u0301",
    "line\nline\r\n\n\ttab\u00a0nbsp\u2003em  ",
    "3.14159 in 2024, 1/2 ½ ٣ 100% $5 <br /><br />",
    "!?...--''\"\"''s",
    "\x00\x7f\ufffd",
]
SPOILS = {
    "merges.txt": (r"(?s)^(#.*?\n)(.*?\n){3}", r"\1"),
    "config.json": ('("eos_token_id": )13', r"\g<1>262"),
    "tokenizer_config.json": (r'endoftext|(?<="eos_token": ")\.', "end"),
    "trainer_state.json": (r'("(global_step|step|ppo/loss/total)": -?)', r"\g<1>1"),
}
passed = failed = 0


def check(name, difference, limit=1e-4):
    """The limit 1e-4 is for log-probabilities (nats), rewards and values."""
    global passed, failed
    ok = difference <= limit  # False for nan
    passed, failed = passed + ok, failed + (not ok)
    print("%-4s %8.2g  %s" % ("ok" if ok else "FAIL", difference, name), flush=True)


def apart(a, b):
    """The greatest |a - b| of numbers, lists or tensors; infinite where shapes differ."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    if a.shape != b.shape:
        return math.inf
    return (a - b).abs().max().item() if a.numel() else 0.0


def worst(pairs):
    """The greatest |a - b| over pairs; nan if any is."""
    most = 0.0
    for a, b in pairs:
        difference = apart(a, b)
        most = difference if math.isnan(difference) or difference > most else most
    return most


def differ(a, b):
    """How many of two lists' elements are not the same."""
    return sum(x != y for x, y in zip(a, b))


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


def jsonl(file, items):
    Path(file).write_text("".join(json.dumps(item) + "\n" for item in items))
    return file


def change_json(file, **settings):
    """Sets some of the keys of a JSON file."""
    file = Path(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def align(command, *args, **flags):
    """What align prints; a flag is given as name=value, several values as a list."""
    words = [command, *args]
    for name, value in flags.items():
        words.append("--" + name)
        if value is not True:
            words += value if isinstance(value, list) else [value]
    words = [str(word) for word in words]
    p = subprocess.run([opt.align, *words, "--quiet"], capture_output=True, encoding="utf-8")
    if p.returncode:
        raise RuntimeError("align %s\n%s" % (" ".join(words), p.stderr))
    return p.stdout


def train(command, folder, data, steps=6, **flags):
    """align COMMAND, some steps at a rate that moves the weights; the folder that it wrote."""
    flags = {"max_steps": steps, "learning_rate": 1e-2, "logging_steps": 1, **flags}
    if command != "pretrain":
        flags.setdefault("model_name_or_path", "base")
    align(command, output_dir=folder, dataset_name=data, **flags)
    return folder


def ask(command, folder, **flags):
    """align logprob or align score, on TEXTS."""
    return rows(align(command, model_name_or_path=folder, dataset_name="texts.jsonl", **flags))


def tokenized(vocab_size, file):
    """The ids of a file's texts, by align."""
    lines = rows(align("tokenize", "--jsonl", "--vocab_size", vocab_size, file))
    return [line["input_ids"] for line in lines]


def handed(folder):
    """The folder as the other program gets it.

    That is as it is, or with --spoil a copy with something wrong in each file.
    """
    if not opt.spoil:
        return folder
    copy = Path(shutil.copytree(folder, tempfile.mkdtemp(dir="."), dirs_exist_ok=True))
    for file in copy.rglob("*.*"):
        if file.suffix == ".safetensors":
            tensors = {k: (1.03 * v.float()).to(v.dtype) for k, v in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})
        elif file.suffix == ".jsonl":
            text = file.read_text(encoding="utf-8")
            file.write_text('{"text": "spoilt"}\n' + text, encoding="utf-8")
        elif file.name in SPOILS:
            text = file.read_text(encoding="utf-8")
            file.write_text(re.sub(*SPOILS[file.name], text), encoding="utf-8")
    return str(copy)


def causal(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def classifier(folder, **settings):
    return AutoModelForSequenceClassification.from_pretrained(folder, **settings).eval()


def adapted(model, folder):
    return PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def randomized(model):
    """Every trainable weight moved by N(0, 0.2), and no dropout.

    A model far from even odds, with biases that matter.
    """
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def logprobs_of(model, ids):
    out = model(torch.tensor([ids]))
    logits = out[0] if isinstance(out, tuple) else out.logits
    logprobs, targets = logits[0, :-1].double().log_softmax(-1), torch.tensor(ids[1:])
    return logprobs.gather(1, targets.view(-1, 1)).view(-1)


def same_logprobs(name, lines, model):
    """Lines of `align logprob` against the model."""
    pairs = ((r["token_logprobs"], logprobs_of(model, r["input_ids"])) for r in lines)
    check(name + ": log-probabilities", worst(pairs))


@torch.no_grad()
def logits_of(model, lines):
    """Of a classifier, for the texts of lines one at a time: nothing is padded."""
    tok = AutoTokenizer.from_pretrained("base")
    ids = [tok(r["text"])["input_ids"][: SHAPE["n_positions"]] for r in lines]
    return [model(torch.tensor([i])).logits[0] for i in ids]


def same_rewards(name, lines, model):
    """Lines of `align score` against the model."""
    pairs = (([r["reward"]], logits) for r, logits in zip(lines, logits_of(model, lines)))
    check(name + ": rewards", worst(pairs))


def language_model():
    name = "language model, align > AutoModelForCausalLM"
    same_logprobs(name, ask("logprob", "base"), causal(handed("base")))
    for kind, dtype, size in (
        ("float32", torch.float32, "1GB"),
        ("several files", torch.float32, "30KB"),
        ("bfloat16", torch.bfloat16, "1GB"),
        ("float16", torch.float16, "1GB"),
    ):
        config = GPT2Config(**SHAPE, bos_token_id=512, eos_token_id=512)
        model = randomized(transformers.GPT2LMHeadModel(config)).to(dtype)
        model.save_pretrained(kind, max_shard_size=size)
        AutoTokenizer.from_pretrained("base").save_pretrained(kind)
        name = "language model, GPT2LMHeadModel, %s > align" % kind
        same_logprobs(name, ask("logprob", handed(kind)), model.float())


def beside_the_base(kind):
    """Configuration and vocabulary of the base in a folder; the file of its weights, to be made."""
    os.makedirs(kind, exist_ok=True)
    AutoModelForCausalLM.from_pretrained("base").config.save_pretrained(kind)
    AutoTokenizer.from_pretrained("base").save_pretrained(kind)
    return kind + "/model.safetensors"


def output_layer():
    """The output layer as files hold it.

    Only lm_head (safetensors' save_model keeps the first of two names), both and equal, untied but
    equal; and the names that torch.compile and DataParallel write.
    """
    model = randomized(AutoModelForCausalLM.from_pretrained("base"))
    kinds = {}
    save_model(model, beside_the_base("head_only"), {"format": "pt"})
    kinds["only lm_head, safetensors' save_model"] = "head_only"
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, beside_the_base("head_both"), {"format": "pt"})
    kinds["wte and lm_head, equal"] = "head_both"
    save_file(state, beside_the_base("head_twice"), {"format": "pt"})
    model.config.save_pretrained("head_twice")
    change_json("head_twice/config.json", tie_word_embeddings=False)
    kinds["tie_word_embeddings false, equal"] = "head_twice"
    compiled, parallel = torch.compile(model), torch.nn.DataParallel(model)
    wrapped = {"compiled": compiled, "parallel": parallel}
    wrapped["parallel_compiled"] = torch.nn.DataParallel(compiled)
    for folder, wrapper in wrapped.items():
        state = {k: v.clone() for k, v in wrapper.state_dict().items()}
        save_file(state, beside_the_base(folder), {"format": "pt"})
        kinds[folder] = folder
    for name, folder in kinds.items():
        name = "output layer and names, %s > align" % name
        same_logprobs(name, ask("logprob", handed(folder)), model)
    for folder in ("head_only", "head_both", "head_twice"):
        name = "output layer, %s, the library's own reading" % folder
        same_logprobs(name, ask("logprob", handed(folder)), causal(folder))


def same_sentiment(name, lines, model, labels):
    """Lines of `align score` against the text-classification pipeline.

    `labels`: the negative, the positive.
    """
    pipe = transformers.pipeline(
        "text-classification",
        model=model,
        tokenizer=AutoTokenizer.from_pretrained("base"),
        function_to_apply="softmax",
        top_k=None,
    )
    pairs = []
    for r in lines:
        ours = {x["label"]: x["score"] for x in r["pipe_outputs"]}
        told = pipe([r["text"]], truncation=True, max_length=SHAPE["n_positions"])[0]
        told = {x["label"]: x["score"] for x in told}
        pairs.append(([ours["NEGATIVE"], ours["POSITIVE"]], [told[label] for label in labels]))
    check(name + ": the pipeline's scores", worst(pairs))
    positive = model.config.label2id[labels[1]]
    margins = [x[positive] - x[1 - positive] for x in logits_of(model, lines)]
    check(name + ": rewards", worst((r["reward"], m) for r, m in zip(lines, margins)))


def two_labels():
    """transformers' default of two labels, in either order.

    Under names that say which is positive and names that do not.
    """
    for labels in (["NEGATIVE", "POSITIVE"], ["POSITIVE", "NEGATIVE"], ["LABEL_0", "LABEL_1"]):
        names = dict(id2label=dict(enumerate(labels)))
        names["label2id"] = {label: i for i, label in enumerate(labels)}
        config = GPT2Config(**SHAPE, **names, **ENDS)
        model = randomized(transformers.GPT2ForSequenceClassification(config))
        folder = "labels_" + labels[0]
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained("base").save_pretrained(folder)
        order = labels if labels[0] != "POSITIVE" else labels[::-1]
        name = "two labels, %s first > align" % labels[0]
        same_sentiment(name, ask("score", handed(folder)), model, order)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)
    model = randomized(get_peft_model(classifier("base", num_labels=2), config))
    model.save_pretrained("saved_lora_labels")
    lines = ask("score", "base", peft_adapter=handed("saved_lora_labels"))
    name = "two labels, LoRA, get_peft_model > align"
    same_sentiment(name, lines, model.merge_and_unload(), ["LABEL_0", "LABEL_1"])
    train("reward", "labels_on", REVIEWS, model_name_or_path="labels_NEGATIVE")
    name = "two labels trained further, align > AutoModelForSequenceClassification"
    same_rewards(name, ask("score", "labels_on"), classifier(handed("labels_on")))


def tokenizer():
    train("pretrain", "wide", REVIEWS, 1, n_layer=1, n_embd=8, n_head=1, n_positions=32)
    forged = ["<|endoftext|>", "a<|endoftext|>b <|endoftext|>\n"]
    jsonl("forged.jsonl", [{"text": t} for t in TEXTS + forged])
    for folder, V in (("base", 513), ("wide", 50257)):
        tok = AutoTokenizer.from_pretrained(handed(folder))
        name = "tokenizer of %d ids, align > AutoTokenizer: " % V
        ours, theirs = tokenized(V, "forged.jsonl"), [tok(t)["input_ids"] for t in TEXTS]
        check(name + "texts that differ, of %d" % len(TEXTS), differ(theirs, ours), 0)
        cut = [r["input_ids"] for r in ask("logprob", folder)]
        different = differ([ids[:32] for ids in theirs], cut)
        check(name + "input_ids of logprob that differ", different, 0)
        ids = [tok.eos_token_id, tok.pad_token_id, len(tok)]
        check(name + "id of the end, size", apart(ids, [V - 1, V - 1, V]), 0)
        # In align <|endoftext|> is ordinary text; transformers takes it so only when it is told to.
        different = 0
        for t, ids in zip(forged, ours[len(TEXTS) :]):
            plain = tok(t, split_special_tokens=True)["input_ids"]
            different += not (plain == ids != tok(t)["input_ids"])
        said = "texts with <|endoftext|> that differ from split_special_tokens"
        check(name + said, different, 0)


def end_token():
    """A model that ends its texts in an ordinary token, "." (13)."""
    shutil.copytree("base", "dotted")
    change_json("dotted/config.json", eos_token_id=13, pad_token_id=13)
    one = jsonl("one.jsonl", [{"prompt": "The film is", "completion": " good"}])
    train("sft", "ended", one, 40, model_name_or_path="dotted")
    tok, model = AutoTokenizer.from_pretrained(handed("ended")), causal(handed("ended"))
    name = "end token 13, align sft > "
    ids = [model.config.eos_token_id, tok.eos_token_id, tok.pad_token_id, len(tok)]
    said = "AutoTokenizer, config: ids of the end and of padding, size"
    check(name + said, apart(ids, [13, 13, 13, 513]), 0)
    texts = TEXTS + ["a... b.c. ", "."]
    jsonl("dots.jsonl", [{"text": t} for t in texts])
    different = differ([tok(t)["input_ids"] for t in texts], tokenized(513, "dots.jsonl"))
    check(name + "AutoTokenizer: texts that differ, of %d" % len(texts), different, 0)
    prompt = torch.tensor([tok("The film is")["input_ids"]])
    mask = torch.ones_like(prompt)
    theirs = model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False)
    theirs = theirs[0, prompt.shape[1] :].tolist()
    flags = dict(model_name_or_path="ended", prompt="The film is", max_new_tokens=12)
    ours = rows(align("generate", "--json", **flags))[0]["sequences"][0]
    difference = worst([(ours, theirs), ([ours[-1], len(ours) < 12], [13, 1])])
    check(name + "generate: %d tokens, the last of them 13" % len(ours), difference, 0)


def padding_token():
    """A model with a padding token that transformers has added."""
    one = jsonl("one.jsonl", [{"prompt": "The film is", "completion": " good"}])
    tok, model = AutoTokenizer.from_pretrained("wide"), AutoModelForCausalLM.from_pretrained("wide")
    tok.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tok))
    model.config.pad_token_id = tok.pad_token_id
    model.save_pretrained("padding")
    tok.save_pretrained("padding")
    for folder, after in (("padding", "padding_1"), ("padding_1", "padding_2")):
        train("sft", after, one, 1, model_name_or_path=folder)
        tok = AutoTokenizer.from_pretrained(handed(after))
        config = transformers.AutoConfig.from_pretrained(after)
        ids = [tok.convert_tokens_to_ids("[PAD]"), tok.pad_token_id, config.pad_token_id]
        ids += [tok.eos_token_id, len(tok)]
        name = "[PAD] added by transformers, %s > AutoTokenizer: ids, size" % after
        check(name, apart(ids, [50257, 50257, 50257, 50256, 50258]), 0)


def reward_model():
    name = "reward model, align > AutoModelForSequenceClassification"
    same_rewards(name, ask("score", "reward"), classifier(handed("reward")))
    config = GPT2Config(**SHAPE, num_labels=1, **ENDS)
    model = randomized(transformers.GPT2ForSequenceClassification(config))
    model.save_pretrained("saved_reward")
    AutoTokenizer.from_pretrained("base").save_pretrained("saved_reward")
    name = "reward model, GPT2ForSequenceClassification > align"
    same_rewards(name, ask("score", handed("saved_reward")), model)


def lora_config(targets, **settings):
    modules = dict(target_modules=targets, fan_in_fan_out=True)
    return LoraConfig(task_type="CAUSAL_LM", r=4, **modules, **settings)


def lora():
    """Adapters of language models: trained by align, and merged; then made by PEFT."""
    for command, data, targets, rslora in (
        ("sft", REVIEWS, ["c_attn", "c_proj"], {}),
        ("dpo", "pairs.jsonl", ["attn.c_proj", "mlp.c_fc"], {"use_rslora": True}),
    ):
        shown = " ".join([command, *targets, *("--" + flag for flag in rslora)])
        name, folder, merged = "LoRA, align %s > " % shown, "lora_" + command, "merged_" + command
        flags = dict(use_peft=True, lora_r=4, lora_target_modules=targets, **rslora)
        train(command, folder, data, **flags)
        model = adapted(causal("base"), handed(folder))
        same_logprobs(name + "PeftModel", ask("logprob", "base", peft_adapter=folder), model)
        align("merge", model_name_or_path="base", peft_adapter=folder, output_dir=merged)
        ours = load_file(merged + "/model.safetensors")
        theirs = model.merge_and_unload().state_dict()
        theirs.pop("lm_head.weight")  # the same tensor as wte
        difference = math.inf
        if ours.keys() == theirs.keys():
            difference = worst((ours[k], theirs[k]) for k in ours)
        check(name + "merge_and_unload: weights", difference, 1e-6)
    for targets, rslora in (
        (["c_attn", "c_proj"], False),
        (["mlp.c_proj", "c_fc"], True),
        ("all-linear", False),
        (r".*\.[01]\.attn\.c_.*", False),
    ):
        config = lora_config(targets, lora_alpha=6, use_rslora=rslora)
        model = randomized(get_peft_model(causal("base"), config))
        model.save_pretrained("saved_lora")
        name = "LoRA, get_peft_model %s%s > align" % (targets, " use_rslora" * rslora)
        same_logprobs(name, ask("logprob", "base", peft_adapter=handed("saved_lora")), model)
    name = "LoRA, get_peft_model > align, the adapter's folder alone"
    same_logprobs(name, ask("logprob", handed("saved_lora")), model)


def lora_of_some():
    """Adapters of some layers and modules, and with a copy of a whole one."""
    for settings in (
        dict(layers_to_transform=[1]),
        dict(layers_to_transform=[0], layers_pattern="h"),
        dict(exclude_modules=["mlp.c_proj", "h.0.attn.c_attn"]),
        dict(modules_to_save=["lm_head"]),
    ):
        model = get_peft_model(causal("base"), lora_config(["c_attn", "c_proj"], **settings))
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)  # what modules_to_save copies stays as it is
        randomized(model).save_pretrained("saved_partial")
        lines = ask("logprob", "base", peft_adapter=handed("saved_partial"))
        same_logprobs("LoRA, get_peft_model %s > align" % settings, lines, model)
        flags = dict(peft_adapter="saved_partial", learning_rate=1e-30)
        train("sft", "partial_on", REVIEWS, 1, **flags)
        lines = ask("logprob", "base", peft_adapter="partial_on")
        again = adapted(causal("base"), handed("partial_on"))
        same_logprobs("LoRA, %s, trained on, align > PeftModel" % settings, lines, again)
        shutil.rmtree("partial_on")


def lora_reward_model():
    flags = dict(use_peft=True, lora_target_modules=["c_attn", "c_proj"])
    train("reward", "lora_reward", REVIEWS, **flags)
    model = adapted(classifier("base", num_labels=1), handed("lora_reward"))
    lines = ask("score", "base", peft_adapter="lora_reward")
    same_rewards("LoRA reward model, align > PeftModel", lines, model)
    align("merge", model_name_or_path="lora_reward", output_dir="merged_reward")
    name = "LoRA reward model, align merge > merge_and_unload"
    same_rewards(name, ask("score", "merged_reward"), model.merge_and_unload())
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)
    model = randomized(get_peft_model(classifier("base", num_labels=1), config))
    model.save_pretrained("saved_lora_reward")
    lines = ask("score", "base", peft_adapter=handed("saved_lora_reward"))
    same_rewards("LoRA reward model, get_peft_model > align", lines, model)


SPLIT_FOLDERS = [
    ["train.jsonl", "validation.jsonl"],
    ["training.jsonl", "data_test.jsonl"],
    ["my train.jsonl", "my eval.jsonl"],
    ["train.jsonl", "train_2.jsonl", "val.jsonl", "test.jsonl"],
    ["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl", "old_train.jsonl"],
    ["sub/train.jsonl", "sub/dev.jsonl"],
    ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"],
    [
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
        "train_old.jsonl",
    ],
    ["a.jsonl", "b.jsonl"],
    ["trainer.jsonl", "tests.jsonl"],
]


def data_splits():
    """A folder of data: align trains on the rows of load_dataset's train split.

    It holds out those of its validation or test split. Of the latter align says no more than the
    loss: it must be that of a file with load_dataset's rows.
    """
    for number, names in enumerate(SPLIT_FOLDERS):
        folder, name = Path("splits_%d" % number), "data, %s > align: " % ", ".join(names)
        for i, file in enumerate(names):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            texts = ["Row %d of a file, the number %d." % (k, i) for k in range(3)]
            jsonl(folder / file, [{"text": text} for text in texts])
        splits = datasets.load_dataset(str(handed(folder)), cache_dir="cache")
        ours = rows(align("score", model_name_or_path="reward", dataset_name=folder))
        different = [r["text"] for r in ours] != list(splits["train"]["text"])
        check(name + "rows of the train split", different, 0)
        held_out = splits.get("validation", splits.get("test"))
        if held_out is None:
            continue
        jsonl("held_out.jsonl", [{"text": text} for text in held_out["text"]])
        loss = []
        for eval_dataset in (folder, "held_out.jsonl"):
            train("sft", "splits_out", folder, 1, eval_dataset=eval_dataset)
            state = json.loads(Path("splits_out/trainer_state.json").read_text())
            loss += [h["eval_loss"] for h in state["log_history"] if "eval_loss" in h]
        check(name + "eval_loss on the %s split" % held_out.split, abs(loss[0] - loss[1]), 0)


def trainer_state():
    """transformers 5 alone reads it: 4.45 knows no "best_global_step".

    The lab plots loss against step or epoch; PPO's curves are in stats_all.
    """
    steps = 6
    for command, data, flags in (
        ("sft", REVIEWS, dict(eval_dataset="few.jsonl")),
        ("reward", REVIEWS, {}),
        ("dpo", "pairs.jsonl", {}),
        ("ppo", REVIEWS, dict(reward_model_path="reward", batch_size=4, mini_batch_size=4)),
    ):
        folder = train(command, "state_" + command, data, steps, **flags)
        name = "trainer_state.json of %s > TrainerState: " % command
        state = TrainerState.load_from_json(handed(folder) + "/trainer_state.json")
        totals = [state.global_step, state.max_steps]
        check(name + "global_step, max_steps", apart(totals, [steps, steps]), 0)
        if command == "ppo":
            stats = rows(Path(folder, "stats_all.jsonl").read_text())
            loss = [[h["ppo/loss/total"] for h in log] for log in (state.log_history, stats)]
            check(name + "ppo/loss/total", apart(*loss), 0)
            continue
        entries = [h for h in state.log_history if {"step", "epoch"} <= h.keys()]
        curve = [(h["epoch"], h["step"], h["loss"]) for h in entries if "loss" in h]
        growing = curve == sorted(curve)
        growing = growing and all(epoch > 0 and math.isfinite(loss) for epoch, _, loss in curve)
        difference = apart([step for _, step, _ in curve], range(1, steps + 1))
        check(name + "loss, step, epoch", difference if growing else math.inf, 0)
        if command == "sft":
            evaluated = [h["step"] for h in entries if "eval_loss" in h]
            check(name + "eval_loss, step, epoch", apart(evaluated, [steps]), 0)


def checkpoints():
    """A folder checkpoint-N is a model with a log; its moments have torch's names.

    That transformers' Trainer goes on from it is checked by docs/tools/check_outgrow.py.
    """
    order = dict(per_device_train_batch_size=4, train_sampling_strategy="sequential")
    folder = train("sft", "saved", REVIEWS, save_steps=1, **order)
    shutil.copytree("saved/checkpoint-6", "last")
    name = "checkpoint-6, align > AutoModelForCausalLM"
    same_logprobs(name, ask("logprob", folder), causal(handed("last")))
    state = TrainerState.load_from_json(handed("saved/checkpoint-2") + "/trainer_state.json")
    found = [state.global_step, len(state.log_history)]
    check("checkpoint-2 > TrainerState: global_step, entries", apart(found, [2, 2]), 0)
    first = handed("saved/checkpoint-1")
    moments, pairs = load_file(first + "/optimizer.safetensors"), []
    for name in load_file(first + "/model.safetensors"):
        name = name.replace("transformer.", "")
        # after one step exp_avg is 0.1 d, exp_avg_sq 0.001 d^2
        m = moments["exp_avg." + name] / 0.1
        v = (moments["exp_avg_sq." + name] / 0.001).sqrt()
        pairs.append((m.abs() / m.abs().max(), v / m.abs().max()))
    name = "checkpoint-1, optimizer.safetensors: moments of every weight"
    check(name, worst(pairs), 1e-3)
    folder = "saved_reward_steps"
    train("reward", folder, REVIEWS, model_name_or_path="reward", save_steps=6)
    name = "checkpoint-6 of a reward model > AutoModelForSequenceClassification"
    same_rewards(name, ask("score", folder), classifier(handed(folder + "/checkpoint-6")))
    train("sft", "lora_steps", REVIEWS, save_steps=1, use_peft=True, lora_r=4, **order)
    lines = ask("logprob", "base", peft_adapter="lora_steps")
    model = adapted(causal("base"), handed("lora_steps/checkpoint-6"))
    same_logprobs("checkpoint-6 of an adapter > PeftModel", lines, model)


@torch.no_grad()
def same_values(name, folder, model, rollouts):
    """align's statistics of values and log-probabilities of responses, against TRL's model.

    4 responses a step.
    """
    align(
        "ppo",
        model_name_or_path=folder,
        rollouts=jsonl("rollouts.jsonl", rollouts),
        output_dir="replayed",
        batch_size=4,
        mini_batch_size=4,
        max_steps=len(rollouts) // 4,
        learning_rate=1e-30,
    )
    stats, pairs = rows(Path("replayed/stats_all.jsonl").read_text()), []
    keys = ("ppo/val/mean", "ppo/val/var", "objective/entropy")
    for step, s in enumerate(stats):
        values, surprise = [], 0
        for r in rollouts[4 * step : 4 * step + 4]:
            ids, first = r["query_ids"] + r["response_ids"], len(r["query_ids"]) - 1
            values.append(model(torch.tensor([ids]))[2][0, first:-1].double())
            surprise -= logprobs_of(model, ids)[first:].sum() / 4
        values = torch.cat(values)
        pairs.append(([s[key] for key in keys], [values.mean(), values.var(), surprise]))
    check(name + ": %s of %d steps" % (", ".join(keys), len(stats)), worst(pairs))


def value_head():
    """TRL 0.11.4's own class, in the second Python; the policy is a model, then a LoRA adapter."""
    from trl import AutoModelForCausalLMWithValueHead

    load = AutoModelForCausalLMWithValueHead.from_pretrained
    batches = dict(reward_model_path="reward", batch_size=8, mini_batch_size=4)
    for name, folder, flags in (
        ("value head", "ppo", {}),
        ("value head, LoRA", "ppo_lora", {"use_peft": True}),
    ):
        train("ppo", folder, REVIEWS, 2, **batches, **flags)
        rollouts = rows(Path(folder, "rollouts.jsonl").read_text())
        written = load_file(folder + "/model.safetensors")
        model = load(handed(folder), is_trainable=True).eval()
        head, to = model.v_head.summary, name + ", align > TRL"
        weight, bias = written["v_head.summary.weight"], written["v_head.summary.bias"]
        difference = worst([(head.weight.detach(), weight), (head.bias.detach(), bias)])
        check(to + ": v_head.summary, bit for bit", difference, 0)
        same_logprobs(to, ask("logprob", folder), model)
        ids = torch.tensor([rollouts[0]["query_ids"] + rollouts[0]["response_ids"]])
        with torch.no_grad():
            hidden = model.pretrained_model(ids, output_hidden_states=True).hidden_states[-1]
            by_hand = (hidden @ weight.T + bias)[:, :, 0]
            check(to + ": values by hand", apart(model(ids)[2], by_hand))
        same_values(to, folder, model, rollouts)
        back = "saved_" + folder
        os.makedirs(back)  # TRL does not make it
        randomized(model).save_pretrained(back)
        if flags:  # beside an adapter TRL saves the head as a pickle, which align does not read
            head = torch.load(back + "/pytorch_model.bin", weights_only=True)
            save_file(head, back + "/model.safetensors")
        same_values(name + ", TRL > align", handed(back), model, rollouts)


def second_python():
    """This script in the Python that has TRL; its lines are shown, its counts added."""
    global passed, failed
    python = opt.trl_python
    if not shutil.which(python):
        message = "no %s; the top of docs/tools/golden.py says how to make it"
        raise FileNotFoundError(message % python)
    command = [python, __file__, "--with-trl", "--align", opt.align, *["--spoil"] * opt.spoil]
    p = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    parts = re.fullmatch(r"(?s)(.*?)(?:(\d+) passed, (\d+) failed\n)?", p.stdout)
    shown, passed_there, failed_there = parts.groups()
    print(shown, end="")
    if not passed_there:
        raise RuntimeError("%s stopped with exit status %d" % (python, p.returncode))
    passed, failed = passed + int(passed_there), failed + int(failed_there)


def prepare():
    texts = [r["text"] for r in rows(REVIEWS.read_text(encoding="utf-8"))]
    texts = [text for text in texts if len(text) < 50][:40]
    jsonl("texts.jsonl", [{"text": t} for t in TEXTS])
    jsonl("few.jsonl", [{"text": t} for t in texts[:8]])
    pairs = [(t, texts[i - 1]) for i, t in enumerate(texts)]
    pairs = [{"prompt": t[:8], "chosen": t[8:], "rejected": other[8:]} for t, other in pairs]
    jsonl("pairs.jsonl", pairs)
    train("pretrain", "base", REVIEWS, 30, **SHAPE)
    train("reward", "reward", REVIEWS)


# In this order: a part may use what one before it has made.
PARTS = [language_model, output_layer, tokenizer, end_token, padding_token, reward_model]
PARTS += [two_labels, lora, lora_of_some, lora_reward_model, data_splits]


def main():
    versions = [library.__version__ for library in (torch, transformers, peft, datasets)]
    print("torch %s, transformers %s, peft %s, datasets %s" % tuple(versions), flush=True)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    prepare()
    here_only = [value_head] if opt.with_trl else [trainer_state, checkpoints, second_python]
    for part in PARTS + here_only:
        try:
            part()
        except Exception:  # the other parts are checked all the same
            check("%s stopped: %s" % (part.__name__, traceback.format_exc(limit=-1)), math.inf)
    print("%d passed, %d failed" % (passed, failed))


if __name__ == "__main__":
    about = "align's files and the libraries they are for (see the top of this file)"
    ap = argparse.ArgumentParser(description=about)
    ap.add_argument("--align", default="./align", help="the program")
    about = "Python with trl 0.11.4"
    ap.add_argument("--trl-python", default="/tmp/venv_trl011/bin/python", help=about)
    ap.add_argument("--spoil", action="store_true", help="see every check fail")
    about = "this is the Python with trl (used internally)"
    ap.add_argument("--with-trl", action="store_true", help=about)
    opt = ap.parse_args()
    if not shutil.which(opt.align):
        sys.exit("roundtrip.py: no program %s; make builds it" % opt.align)
    opt.align, opt.trl_python = os.path.abspath(opt.align), os.path.abspath(opt.trl_python)
    __file__ = os.path.abspath(__file__)
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        main()
        os.chdir("/")
    sys.exit(failed > 0)
