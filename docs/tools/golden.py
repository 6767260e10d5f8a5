#!/usr/bin/env python3
"""golden.py - where the numbers in test_align.c come from.

align.c re-implements, in plain C, what PyTorch, transformers and TRL compute. This script asks
those three programs for the answers on inputs so small that they fit in a test, and prints the
answers as C arrays:

    python3 docs/tools/golden.py > /tmp/golden.h

VERSIONS the numbers were made with
    Parts A, B, E, F1, G, in the Python that runs this file:
        Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, trl 1.16.0
    Parts C, D, F2, in a virtual environment, below:
        trl 0.11.4, transformers 4.45.2, accelerate 0.34.2, datasets 3.1.0, pyarrow 17.0.0,
        numpy 1.26.4, same torch

TRL 0.11.4 is the last generation with the PPOTrainer the course uses; it does not work with
transformers 5, so parts C, D and F2 run in a second Python. This script starts that Python by
itself (--trl-python, default /tmp/venv_trl011/bin/python). To make it:

    python3 -m venv --system-site-packages /tmp/venv_trl011        # reuses the installed torch
    /tmp/venv_trl011/bin/pip install --no-deps transformers==4.45.2 trl==0.11.4
    /tmp/venv_trl011/bin/pip install "tokenizers>=0.20,<0.21" "huggingface-hub<1.0" \
        accelerate==0.34.2 "numpy<2" datasets==3.1.0 "fsspec<2025" tyro pyarrow==17.0.0 "pandas<2.3"

No model is downloaded and no random number is drawn: every input is a formula, given next to its
use, evaluated in float64 (Python's math.sin and math.cos) and then rounded to float32.

PRECISION. Parts A, C and D are computed in float32, as the originals do, and once more in float64
from the same float32 inputs; the comment on each array gives the largest difference between the two
("f32-f64"). A correct float32 program in C should differ from the printed number by about that
much; a tolerance of 20 times that is fair. Parts B, E and G are computed in float64 on float32
inputs, part F in float64 on the decimal numbers of the example.

WHAT IS PRINTED
    A1 A2  golden_gpt_*: forward pass, loss, gradient of a tiny GPT-2
    A3     golden_adamw_*: 6 steps of AdamW with clipping and a warmup schedule
    A4     golden_rm_*: reward model (GPT2ForSequenceClassification), Bradley-Terry loss
    A5     golden_greedy*, golden_sample_*: greedy generation, sampling filters
    A6     golden_beam*: beam search
    A7     golden_kl: exact KL divergence between two models
    B      golden_logsigmoid*, golden_gelu*, golden_softmax5 ..., golden_ln_*, golden_att_*,
           golden_lin_*: single operations
    C      golden_dpo_*: DPO losses
    D      golden_ppo_*, golden_moments*, golden_klctl*: PPO
    E      golden_sched_*: learning-rate schedules
    F      golden_explain_*: the built-in example of `align explain`, topic by topic
    G      golden_grpo_*: GRPO's advantages, losses and figures
"""

import argparse
import math
import os
import subprocess
import sys
import types
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch  # noqa: E402  (after the environment is set)
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(1)  # everything here is tiny


# --------------------------------------------------------------------------------------------------
# Printing C
# --------------------------------------------------------------------------------------------------
def num(x):
    """One C literal: ints as ints, everything else with 9 significant digits.

    They are enough to name any float32.
    """
    if isinstance(x, int):
        return str(x)
    if x == -math.inf:
        return "-INFINITY"
    s = "%.9g" % x
    return s if any(c in s for c in ".en") else s + ".0"


def tolist(v):
    return v.detach().tolist() if isinstance(v, torch.Tensor) else v


def flat(v):
    return [y for x in v for y in flat(x)] if isinstance(v, (list, tuple)) else [v]


def emit(name, value, what="", f64=None):
    """Print `value` (number, nested list or tensor) as static const golden_<name>.

    `f64`: the same in float64.
    """
    value = tolist(value)
    dims, v = "", value
    while isinstance(v, (list, tuple)):
        dims += "[%d]" % len(v)
        v = v[0]
    ctype = "int" if all(isinstance(x, int) for x in flat(value)) else "double"
    if f64 is not None:
        diff = max(abs(a - b) for a, b in zip(flat(value), flat(tolist(f64)), strict=True))
        what += "  (f32-f64 %.1e)" % diff
    if what:
        print("/* %s */" % what.strip())

    def body(v):
        if not isinstance(v, (list, tuple)):
            return num(v)
        return "{" + ", ".join(body(x) for x in v) + "}"

    text = "static const %s golden_%s%s = %s;" % (ctype, name, dims, body(value))
    line = ""  # wrap at 118 columns, at the blanks
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > 118:
            print(line)
            line = "   "
        line = line + " " + word if line else word
    print(line)


def title(s):
    print("\n/* ---- %s */" % s)


def formula(shape, f):
    """A float32 tensor whose flat (row-major) element i is f(i), computed in float64."""
    n = math.prod(shape)
    return torch.tensor([f(i) for i in range(n)], dtype=torch.float64).float().reshape(shape)


# --------------------------------------------------------------------------------------------------
# A. A tiny GPT-2
# --------------------------------------------------------------------------------------------------
VOCAB, NPOS, EMB, LAYERS, HEADS = 61, 16, 16, 2, 2
LEN = [12, 7]  # real lengths of the two sequences
EOS = 60  # end / padding id; it occurs in neither sequence
# the parameter order of the formula, of golden_gpt_grad*, of transformers
NAMES = ["wte.weight", "wpe.weight"]
for _l in range(LAYERS):
    for _n in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        NAMES += ["h.%d.%s.%s" % (_l, _n, kind) for kind in ("weight", "bias")]
NAMES += ["ln_f.weight", "ln_f.bias"]


def weight(k, shape, is_ln_weight=False):
    """Tensor number k, of flat index i, in float64, then cast to float32:

        v = 0.3*sin(1.7*k + 0.61*i + 0.003*i*i)

    LayerNorm weights are 1 + v/3 (also float64, cast once at the end). Row-major in PyTorch's
    shape: Conv1D matrices (c_attn, c_proj, c_fc) are [in, out], wte [61,16], wpe [16,16].
    """

    def f(i):
        v = 0.3 * math.sin(1.7 * k + 0.61 * i + 0.003 * i * i)
        return 1 + v / 3 if is_ln_weight else v

    return formula(shape, f)


def config():
    from transformers import GPT2Config

    c = GPT2Config(
        vocab_size=VOCAB,
        n_positions=NPOS,
        n_embd=EMB,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        num_labels=1,
    )
    c._attn_implementation = "eager"
    return c


def fill(backbone):
    """Give a GPT2Model the formula's weights."""
    params = list(backbone.named_parameters())
    assert [n for n, _ in params] == NAMES, [n for n, _ in params]
    with torch.no_grad():
        for k, (n, p) in enumerate(params):
            p.copy_(weight(k, p.shape, "ln_" in n and n.endswith("weight")))


def make_lm(dtype=torch.float32, scale=None):
    from transformers import GPT2LMHeadModel

    m = GPT2LMHeadModel(config())
    fill(m.transformer)
    assert m.lm_head.weight is m.transformer.wte.weight  # the output matrix is tied to wte
    if scale is not None:  # float32 product w * 0.9f
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(scale)
    return m.to(dtype).eval()


def inputs():
    """ids[b][t] = (7*t*t + 11*t + 5*b + 3) % 61.

    Sequence 1 is right-padded to 12 with id 60, mask 0, label -100.
    """
    ids = torch.full((2, max(LEN)), EOS)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for b, n in enumerate(LEN):
        ids[b, :n] = torch.tensor([(7 * t * t + 11 * t + 5 * b + 3) % VOCAB for t in range(n)])
        mask[b, :n] = 1
        labels[b, :n] = ids[b, :n]
    assert not any((ids[b, :n] == EOS).any() for b, n in enumerate(LEN))
    return ids, mask, labels


def real(x):
    """[2,12,...] -> the 12 + 7 = 19 real positions, sequence 0 first."""
    return torch.cat([x[b, :n] for b, n in enumerate(LEN)])


def lm_loss(model, ids, mask, labels):
    """Mean cross entropy of the 11 + 6 = 17 next-token targets."""
    logits = model(input_ids=ids, attention_mask=mask).logits
    flat_logits, targets = logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
    return F.cross_entropy(flat_logits, targets, ignore_index=-100), logits


LOGIT_AT = [[0, 0, 0], [0, 0, 60], [0, 5, 17], [0, 11, 3], [0, 11, 42]]
LOGIT_AT += [[1, 0, 8], [1, 3, 33], [1, 6, 60]]


def forward_backward(dtype):
    """A1 and A2 in one precision."""
    ids, mask, labels = inputs()
    m = make_lm(dtype)
    loss, logits = lm_loss(m, ids, mask, labels)
    if dtype == torch.float32:  # transformers' own loss agrees
        own_loss = m(input_ids=ids, attention_mask=mask, labels=labels).loss
        assert abs(own_loss.item() - loss.item()) < 1e-6
        for b, n in enumerate(LEN):  # and padding changes nothing
            alone = m(input_ids=ids[b : b + 1, :n]).logits[0]
            assert torch.allclose(alone, logits[b, :n], atol=1e-5)
    loss.backward()
    logp = logits.log_softmax(-1)
    target = [logp[b, : n - 1].gather(1, ids[b, 1:n, None])[:, 0] for b, n in enumerate(LEN)]
    grads = [p.grad.flatten() for p in m.transformer.parameters()]
    return dict(
        loss=loss.item(),
        logit=[logits[b, t, v].item() for b, t, v in LOGIT_AT],
        lse=real(logits.logsumexp(-1)),
        target=torch.cat(target),
        norm=[g.norm().item() for g in grads],
        total=torch.cat(grads).norm().item(),
        ends=[[g[0].item(), g[1].item(), g[-2].item(), g[-1].item()] for g in grads],
    )


def part_forward_backward():
    a, d = forward_backward(torch.float32), forward_backward(torch.float64)
    assert abs(a["loss"] + sum(tolist(a["target"])) / 17) < 1e-5
    title("A1. tiny GPT-2: vocab 61, positions 16, width 16, layers 2, heads 2; forward pass")
    what = "ids[b][t] = (7tt + 11t + 5b + 3) % 61, lengths 12 and 7, then padding 60"
    emit("gpt_ids", inputs()[0], what)
    emit("gpt_loss", a["loss"], "mean next-token loss over the 17 targets", d["loss"])
    emit("gpt_logit_at", LOGIT_AT, "{b, t, v} of the logits below")
    emit("gpt_logit", a["logit"], "", d["logit"])
    emit("gpt_lse", a["lse"], "logsumexp of the logits at the 12 + 7 real positions", d["lse"])
    what = "log-probability of id[t+1] at t: 11 + 6 targets"
    emit("gpt_target_logp", a["target"], what, d["target"])
    title("A2. gradient of golden_gpt_loss; tensors in the order wte wpe, 12 per block, ln_f (28)")
    emit("gpt_grad_total", a["total"], "norm of all of them together", d["total"])
    what = "L2 norm per tensor (c_attn.bias contains the key bias, whose true gradient is 0)"
    emit("gpt_grad_norm", a["norm"], what, d["norm"])
    emit("gpt_grad_ends", a["ends"], "first two and last two entries per tensor", d["ends"])


def adamw(dtype):
    """A3: 6 steps on the same batch."""
    from transformers import get_linear_schedule_with_warmup

    ids, mask, labels = inputs()
    m = make_lm(dtype)
    ps = list(m.parameters())
    groups = [
        {"params": [p for p in ps if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in ps if p.dim() != 2], "weight_decay": 0.0},
    ]
    opt = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    sched = get_linear_schedule_with_warmup(opt, num_warmup_steps=2, num_training_steps=6)
    r = dict(loss=[], norm=[], lr=[])
    for _ in range(6):
        loss, _logits = lm_loss(m, ids, mask, labels)
        opt.zero_grad()
        loss.backward()
        r["norm"].append(torch.nn.utils.clip_grad_norm_(ps, 1.0).item())
        r["lr"].append(opt.param_groups[0]["lr"])
        r["loss"].append(loss.item())
        opt.step()
        sched.step()
    r["final"] = lm_loss(m, ids, mask, labels)[0].item()
    r["wte"] = m.transformer.wte.weight.flatten()[:4]
    r["ln_f"] = m.transformer.ln_f.weight.flatten()[:4]
    return r


def part_adamw():
    a, d = adamw(torch.float32), adamw(torch.float64)
    title(
        "A3. AdamW lr .01, betas .9 .999, eps 1e-8, decay .1 on 2-d tensors only, clip 1.0,"
        " linear warmup 2 of 6 steps"
    )
    what = "loss before each update (the first update has learning rate 0)"
    emit("adamw_loss", a["loss"], what, d["loss"])
    emit("adamw_norm", a["norm"], "gradient norm before clipping", d["norm"])
    emit("adamw_lr", a["lr"], "learning rate used for the update")
    emit("adamw_final", a["final"], "loss after the 6th update", d["final"])
    emit("adamw_wte", a["wte"], "wte[0..3] after the 6th update", d["wte"])
    emit("adamw_ln_f", a["ln_f"], "ln_f.weight[0..3] after the 6th update (not decayed)", d["ln_f"])


def reward(dtype):
    from transformers import GPT2ForSequenceClassification

    ids, mask, _labels = inputs()
    m = GPT2ForSequenceClassification(config())
    fill(m.transformer)
    with torch.no_grad():
        m.score.weight.copy_(weight(100, m.score.weight.shape))
    m = m.to(dtype).eval()
    r = m(input_ids=ids, attention_mask=mask).logits[:, 0]
    loss = -F.logsigmoid(r[0] - r[1])
    loss.backward()
    return dict(
        r=r,
        loss=loss.item(),
        score=m.score.weight.grad.norm().item(),
        ends=m.score.weight.grad[0, :4],
        wte=m.transformer.wte.weight.grad.norm().item(),
        wpe=m.transformer.wpe.weight.grad.norm().item(),
    )


def two_labels(dtype):
    """The sentiment pipeline's numbers: logits of two labels; by softmax, the score of label 1."""
    from transformers import GPT2ForSequenceClassification

    ids, mask, _labels = inputs()
    c = config()
    c.num_labels = 2
    m = GPT2ForSequenceClassification(c)
    fill(m.transformer)
    with torch.no_grad():
        m.score.weight.copy_(weight(100, m.score.weight.shape))
        logits = m.to(dtype).eval()(input_ids=ids, attention_mask=mask).logits
    return logits, logits.softmax(-1)[:, 1]


def part_reward():
    a, d = reward(torch.float32), reward(torch.float64)
    title("A4. GPT2ForSequenceClassification, 1 label: score.weight [1,16] = formula with k = 100")
    what = "score at the last real token of sequence 0 (t = 11) and 1 (t = 6)"
    emit("rm_reward", a["r"], what, d["r"])
    emit("rm_loss", a["loss"], "Bradley-Terry: -logsigmoid(r0 - r1)", d["loss"])
    emit("rm_score_grad_norm", a["score"], "", d["score"])
    emit("rm_score_grad", a["ends"], "first four entries", d["ends"])
    emit("rm_wte_grad_norm", a["wte"], "", d["wte"])
    emit("rm_wpe_grad_norm", a["wpe"], "", d["wpe"])
    a, d = two_labels(torch.float32), two_labels(torch.float64)
    what = "two labels, score.weight [2,16] = formula with k = 100: their logits"
    emit("rm_two_logits", a[0], what, d[0])
    emit("rm_two_positive", a[1], "softmax: the score of label 1", d[1])


def generate(model, prompt, **kw):
    """The 8 likeliest new tokens, greedily or in beams."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=EOS,
        return_dict_in_generate=True,
        output_scores=True,
        **kw,
    )


def part_generate():
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids = inputs()[0]
    prompt = ids[:1, :4]
    models = [make_lm(torch.float32), make_lm(torch.float64)]

    shown = ", ".join(map(str, prompt[0].tolist()))
    title("A5. generation from the prompt ids[0][0..3] = {%s}" % shown)
    for name, kw in (("greedy", {}), ("greedy_rep", {"repetition_penalty": 1.5})):
        out = [generate(m, prompt, min_new_tokens=8, eos_token_id=EOS, **kw) for m in models]
        assert out[0].sequences.tolist() == out[1].sequences.tolist()
        best = [s[0].topk(2).values for s in out[0].scores]
        margin = min((first - second).item() for first, second in best)
        what = "8 greedy tokens%s; the winner leads by at least %.3f"
        what %= (", repetition_penalty 1.5" if kw else "", margin)
        emit(name, out[0].sequences[0, 4:], what)

    # Sampling filters in transformers' order: repetition penalty, temperature, top-k, top-p.
    for name, q in (("sample", 1.0), ("sample_rep", 1.5)):
        procs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(q)] if q != 1 else [])
        procs += [TemperatureLogitsWarper(0.7), TopKLogitsWarper(10), TopPLogitsWarper(0.8)]
        r = []
        for m in models:
            p = procs(prompt, m(input_ids=prompt).logits[:, -1].clone()).softmax(-1)[0]
            n = int((p > 0).sum())
            r.append(p.topk(n))
        assert r[0].indices.tolist() == r[1].indices.tolist()
        penalty = "repetition_penalty 1.5, " if q != 1 else ""
        what = "kept by %stemperature .7, top_k 10, top_p .8 after the prompt" % penalty
        emit(name + "_id", r[0].indices, what)
        emit(name + "_p", r[0].values, "their probabilities", r[1].values)

    title(
        "A6. beam search from the same prompt, 3 beams, at most 8 new tokens,"
        " early_stopping False unless said"
    )

    # Id 60 is never generated. Id 4 is one the model likes: taken as eos it ends some beams early.
    def beam(name, what, eos, length_penalty, **kw):
        kw.update(eos_token_id=eos, length_penalty=length_penalty, num_beams=3)
        out = [generate(m, prompt, num_return_sequences=3, **kw) for m in models]
        assert out[0].sequences.tolist() == out[1].sequences.tolist()
        seqs = [s[4:] for s in out[0].sequences.tolist()]
        lens = [sum(x != EOS for x in s) for s in seqs]
        default = generate(models[0], prompt, num_return_sequences=1, **kw).sequences.tolist()[0]
        assert default[4:] == seqs[0][: lens[0]]  # it is row 0
        emit(name, seqs, what + "; best first, 60 after the end")
        emit(name + "_len", lens, "new tokens, eos included")
        scores = [o.sequences_scores for o in out]
        what = "sum of log-probabilities / length^length_penalty"
        emit(name + "_score", scores[0], what, scores[1])

    beam("beam", "eos 60, length_penalty 1; row 0 is what generate() returns", EOS, 1.0)
    beam("beam_eos4", "eos 4, length_penalty 1", 4, 1.0)
    beam("beam_eos4_long", "eos 4, length_penalty 2", 4, 2.0)
    beam("beam_eos4_zero", "eos 4, length_penalty 0", 4, 0.0)
    early = "eos 4, length_penalty 1, early_stopping True"
    beam("beam_eos4_early", early, 4, 1.0, early_stopping=True)

    title("A7. exact KL(pi || ref), all weights of ref multiplied by 0.9 (float32 product)")
    r = []
    for i, dt in enumerate((torch.float32, torch.float64)):
        with torch.no_grad():
            lp = models[i](input_ids=ids[:1]).logits[0].log_softmax(-1)
            lr = make_lm(torch.float32, 0.9).to(dt)(input_ids=ids[:1]).logits[0].log_softmax(-1)
        r.append(F.kl_div(lr, lp, log_target=True, reduction="none").sum(-1))
        assert (r[-1] > 0).all()
    emit("kl", r[0], "at the 12 positions of sequence 0", r[1])


# --------------------------------------------------------------------------------------------------
# B. Single operations, in float64 on float32 inputs
# --------------------------------------------------------------------------------------------------
def part_ops():
    title("B. single operations (float64)")
    x = torch.tensor([-100, -20, -1, 0, 1, 20, 100.0], dtype=torch.float64)
    emit("logsigmoid_x", x)
    emit("logsigmoid", F.logsigmoid(x))

    from transformers.activations import NewGELUActivation

    x = torch.tensor([-6, -3, -1, -0.5, 0, 0.5, 1, 3, 6], dtype=torch.float64, requires_grad=True)
    y = NewGELUActivation()(x)
    y.sum().backward()
    emit("gelu_x", x)
    emit("gelu", y, "gelu_new: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))")
    emit("gelu_grad", x.grad)

    x = torch.tensor([1, 2, 3, 4, -1.0], dtype=torch.float64)
    emit("softmax5", x.softmax(0), "softmax of {1, 2, 3, 4, -1}")
    emit("log_softmax5", x.log_softmax(0))
    entropy = torch.distributions.Categorical(logits=x).entropy().item()
    emit("entropy5", entropy, "entropy of that distribution, in nats")

    rows = ([1.0, 2, 4, 8], [1, 0.5, -1, 2], [0, 0.1, 0.2, 0.3], [1, -1, 2, 0.5])
    x, w, b, dy = (torch.tensor(r, dtype=torch.float32).double().requires_grad_() for r in rows)
    y = F.layer_norm(x, (4,), w, b, 1e-5)
    y.backward(dy)
    emit("ln_y", y, "layer_norm: x = {1,2,4,8}, w = {1,.5,-1,2}, b = {0,.1,.2,.3}, eps 1e-5")
    emit("ln_dx", x.grad, "for dy = {1,-1,2,.5}")
    emit("ln_dw", w.grad)
    emit("ln_db", b.grad)

    # Causal attention, T = 5, one head of size 4. Flat index i = 4*t + c:
    T, HS = 5, 4
    q = formula((1, 1, T, HS), lambda i: math.sin(0.3 + 0.7 * i + 0.01 * i * i)).double()
    k = formula((1, 1, T, HS), lambda i: math.sin(1.1 + 0.9 * i + 0.02 * i * i)).double()
    v = formula((1, 1, T, HS), lambda i: math.sin(2.3 + 0.5 * i + 0.03 * i * i)).double()
    dout = formula((1, 1, T, HS), lambda i: math.cos(0.4 + 0.8 * i)).double()
    for t in (q, k, v):
        t.requires_grad_()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = q @ k.transpose(-1, -2) / math.sqrt(HS)
    by_hand = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1) @ v
    assert torch.allclose(out, by_hand, atol=1e-12)
    out.backward(dout)
    for n, t, s in (
        ("q", q, "sin(.3+.7i+.01ii)"),
        ("k", k, "sin(1.1+.9i+.02ii)"),
        ("v", v, "sin(2.3+.5i+.03ii)"),
        ("dout", dout, "cos(.4+.8i)"),
    ):
        emit("att_" + n, t[0, 0], "input, i = 4t + c: " + s)
    emit("att_out", out[0, 0], "causal attention, scale 1/2")
    emit("att_dq", q.grad[0, 0])
    emit("att_dk", k.grad[0, 0])
    emit("att_dv", v.grad[0, 0])

    # Linear layer y = x W + b in GPT-2's orientation, W [in, out]; rows 3, in 4, out 2; flat index
    # i:
    #   x = sin(0.2 + 0.5 i)   W = cos(0.1 + 0.7 i)   b = sin(1 + i)   dy = cos(0.3 + 1.1 i)
    from transformers.pytorch_utils import Conv1D

    lin = Conv1D(2, 4).double()
    x = formula((3, 4), lambda i: math.sin(0.2 + 0.5 * i)).double().requires_grad_()
    dy = formula((3, 2), lambda i: math.cos(0.3 + 1.1 * i)).double()
    with torch.no_grad():
        lin.weight.copy_(formula((4, 2), lambda i: math.cos(0.1 + 0.7 * i)))
        lin.bias.copy_(formula((2,), lambda i: math.sin(1.0 + i)))
    y = lin(x)
    y.backward(dy)
    emit("lin_y", y, "y = x W + b: x[3][4] = sin(.2+.5i), W[4][2] = cos(.1+.7i), b[2] = sin(1+i)")
    emit("lin_dx", x.grad, "for dy[3][2] = cos(.3+1.1i)")
    emit("lin_dw", lin.weight.grad)
    emit("lin_db", lin.bias.grad)


# --------------------------------------------------------------------------------------------------
# E. Learning-rate schedules
# --------------------------------------------------------------------------------------------------
def part_schedules():
    from transformers import get_scheduler

    title("E. schedules of transformers: factor at step 0..10, 3 warmup steps, 10 steps in all")
    for name in ("linear", "cosine", "constant", "constant_with_warmup"):
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        s = get_scheduler(name, opt, num_warmup_steps=3, num_training_steps=10)
        r = []
        for _ in range(11):
            r.append(float(s.get_last_lr()[0]))
            opt.step()
            s.step()
        emit("sched_" + name, r)


# --------------------------------------------------------------------------------------------------
# C. DPO losses: TRL 0.11.4's own DPOTrainer.dpo_loss  (runs in the virtual environment)
# --------------------------------------------------------------------------------------------------
DPO = dict(
    pi_chosen=[-12.5, -30.25, -8.0],  # the policy's log-probabilities
    pi_rejected=[-14.0, -25.5, -21.75],
    ref_chosen=[-13.25, -29.0, -10.5],  # the reference's
    ref_rejected=[-13.0, -26.75, -9.25],
    len_chosen=[5, 11, 3],  # completion tokens
    len_rejected=[4, 9, 6],
)
DPO_BETA, DPO_EPS = 0.1, 0.1
DPO_KINDS = {
    "sigmoid": "",
    "sigmoid_smooth": "label smoothing .1, TRL 0.11 (conservative DPO)",
    "robust": "label smoothing .1",
    "hinge": "",
    "ipo": "length-normalised",
    "sft": "negative log-likelihood of the 19 chosen tokens",
    "sigmoid_sft": "sigmoid + 0.5 * sft",
}


def dpo(dtype, kind):
    """The loss averaged over the 3 pairs, its gradients, and the losses of the pairs.

    The gradients are those of the chosen and of the rejected sums.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    t = object.__new__(DPOTrainer)  # no model: only what dpo_loss looks at
    t.accelerator = types.SimpleNamespace(device="cpu")
    t.reference_free, t.beta = False, DPO_BETA
    t.f_divergence_type, t.f_divergence_params = "reverse_kl", None
    t.label_smoothing = DPO_EPS if kind in ("sigmoid_smooth", "robust") else 0.0
    t.loss_type = {"sigmoid_smooth": "sigmoid", "sigmoid_sft": "sigmoid"}.get(kind, kind)
    pc, pr, rc, rr, nc, nr = (torch.tensor(v, dtype=dtype) for v in DPO.values())
    pc.requires_grad_()
    pr.requires_grad_()
    nll = -pc.sum() / nc.sum()  # mean negative log-likelihood over all chosen completion tokens
    if kind == "sft":
        losses = nll.expand(3)
    elif kind == "ipo":  # TRL divides both models' sums by the completion length first
        losses = t.dpo_loss(pc / nc, pr / nr, rc / nc, rr / nr)[0]
    else:
        losses = t.dpo_loss(pc, pr, rc, rr)[0]
        # rpo_alpha in TRL 0.11, loss_type [sigmoid, sft] with weights [1, .5] in 1.x
        if kind == "sigmoid_sft":
            losses = losses + 0.5 * nll
    loss = losses.mean()
    gc, gr = torch.autograd.grad(loss, [pc, pr], allow_unused=True)
    return loss.item(), gc, torch.zeros_like(pr) if gr is None else gr, losses


def part_dpo():
    title("C. DPO, 3 pairs, beta .1; label smoothing .1 only where said; loss = mean over pairs")
    for name, numbers in DPO.items():
        emit("dpo_" + name, numbers)
    for kind, what in DPO_KINDS.items():
        a, d = dpo(torch.float32, kind), dpo(torch.float64, kind)
        if what:
            print("/* %s */" % what)
        emit("dpo_%s_loss" % kind, a[0], "", d[0])
        emit("dpo_%s_pairs" % kind, a[3], "", d[3])
        emit("dpo_%s_dchosen" % kind, a[1], "", d[1])
        emit("dpo_%s_drejected" % kind, a[2], "", d[2])


# --------------------------------------------------------------------------------------------------
# D. PPO: TRL 0.11.4's own PPOTrainer methods  (runs in the virtual environment)
# --------------------------------------------------------------------------------------------------
# Three rows of T = 8 positions; the mask covers the positions which predict a response token.
#   row   query tokens   response tokens   mask = 1 at t      padding behind
#   0     3              6                 2..7               0
#   1     2              4                 1..4               3
#   2     4              3                 3..5               2
# What stands outside the mask is deliberately not zero: it must not matter (except in
# golden_ppo_*_white, see below).
PPO_START, PPO_LEN, PT, PV = [2, 1, 3], [6, 4, 3], 8, 7


def ppo_inputs(dtype):
    """Flat index i = 8*b + t; logits and reference logits have flat index j = 7*i + v."""
    s, c = math.sin, math.cos
    d = dict(
        old=formula((3, PT), lambda i: -1.6 + 1.2 * s(0.4 + 1.3 * i)),
        ref=formula((3, PT), lambda i: -1.7 + 1.1 * s(0.6 + 1.25 * i)),
        val=formula((3, PT), lambda i: 0.5 * s(0.2 + 0.9 * i)),
        new=formula((3, PT), lambda i: -1.6 + 1.2 * s(0.4 + 1.3 * i) + 0.35 * s(1.0 + 2.1 * i)),
        newval=formula((3, PT), lambda i: 0.5 * s(0.2 + 0.9 * i) + 0.3 * c(0.5 + 1.7 * i)),
        logits=formula((3, PT, PV), lambda j: 2 * s(0.1 + 0.77 * j)),
        reflogits=formula((3, PT, PV), lambda j: 2 * s(0.3 + 0.71 * j)),
        scores=torch.tensor([1.5, -0.75, 0.25]),
    )
    d = {k: v.to(dtype) for k, v in d.items()}
    mask = torch.zeros(3, PT, dtype=torch.long)
    for b in range(3):
        mask[b, PPO_START[b] : PPO_START[b] + PPO_LEN[b]] = 1
    return types.SimpleNamespace(mask=mask, **d)


def ppo_trainer(**kw):
    """A PPOTrainer with a configuration and a KL controller, but no model."""
    from trl import PPOConfig
    from trl.trainer.ppo_trainer import AdaptiveKLController, PPOTrainer

    t = object.__new__(PPOTrainer)
    t.config = PPOConfig(**kw)  # else defaults: gamma 1, lam .95, clips .2, vf_coef .1
    t.kl_ctl = AdaptiveKLController(t.config.init_kl_coef, t.config.target, t.config.horizon)
    return t


# fmt: off
STATS = [
    "objective/kl", "objective/entropy", "objective/kl_coef", "ppo/mean_non_score_reward",
    "ppo/mean_scores", "ppo/std_scores", "ppo/loss/policy", "ppo/loss/value", "ppo/loss/total",
    "ppo/policy/entropy", "ppo/policy/approxkl", "ppo/policy/policykl", "ppo/policy/clipfrac",
    "ppo/policy/advantages_mean", "ppo/returns/mean", "ppo/returns/var", "ppo/val/vpred",
    "ppo/val/error", "ppo/val/clipfrac", "ppo/val/mean", "ppo/val/var", "ppo/val/var_explained",
    "tokens/queries_len_mean", "tokens/queries_len_std", "tokens/responses_len_mean",
    "tokens/responses_len_std",
]
# fmt: on


# The three settings beside the defaults of which advantages and returns are printed.
PPO_SETTINGS = {
    "": {},
    "_white": {"whiten_rewards": True},
    "_g9": {"gamma": 0.9, "lam": 0.8},
    "_g9_white": {"gamma": 0.9, "lam": 0.8, "whiten_rewards": True},
}


def ppo(dtype):
    from trl.core import entropy_from_logits, masked_mean, masked_var, masked_whiten
    from trl.core import stack_dicts, whiten

    x, r = ppo_inputs(dtype), {}
    r["mean"], r["var"] = masked_mean(x.val, x.mask), masked_var(x.val, x.mask)
    r["whiten"] = masked_whiten(x.val, x.mask)
    r["whiten_keep"] = masked_whiten(x.val, x.mask, shift_mean=False)
    r["plain_whiten"] = whiten(x.scores)
    r["entropies"] = entropy_from_logits(x.logits)

    kls = {}
    for pen in ("kl", "abs", "mse", "full"):
        t, lp, lr = ppo_trainer(kl_penalty=pen), x.old, x.ref
        if pen == "full":
            lp, lr = x.logits.log_softmax(-1), x.reflogits.log_softmax(-1)
        r["rewards_" + pen], non_score, kls[pen] = t.compute_rewards(x.scores, lp, lr, x.mask)
        if pen == "kl":
            rewards, non_score_kl = r["rewards_kl"], non_score
    for tag, kw in PPO_SETTINGS.items():
        t = ppo_trainer(**kw)
        _v, r["adv" + tag], r["ret" + tag] = t.compute_advantages(x.val, rewards, x.mask)

    # One minibatch update on the whole batch, from the values of the defaults (adv, ret).
    t = ppo_trainer()
    oldval, adv, ret = t.compute_advantages(x.val, rewards, x.mask)
    new, newval = x.new.clone().requires_grad_(), x.newval.clone().requires_grad_()
    loss_p, loss_v, stats = t.loss(x.old, oldval, x.logits, newval, new, x.mask, adv, ret)
    # loss_v is already multiplied by vf_coef = .1
    r["loss_policy"], r["loss_value_scaled"] = loss_p, loss_v
    (loss_p + loss_v).backward()
    r["dlogp"], r["dvalue"] = new.grad, newval.grad
    r["ratio"] = stats["policy/ratio"]
    stats = t.record_step_stats(
        kl_coef=t.kl_ctl.value,
        scores=x.scores,
        logprobs=x.old,
        ref_logprobs=x.ref,
        masks=x.mask,
        kls=kls["kl"],
        non_score_reward=non_score_kl,
        queries=[[0] * (s + 1) for s in PPO_START],
        responses=[[0] * n for n in PPO_LEN],
        train_stats=stack_dicts([stats]),
    )
    r["stats"] = [float(stats[k]) for k in STATS]
    assert abs(stats["ppo/loss/value"].item() * 0.1 - loss_v.item()) < 1e-6

    # First pass over a batch: new = old, so the ratio is 1 and the gradient is -A/N.
    same = x.old.clone().requires_grad_()
    t.loss(x.old, oldval, x.logits, newval.detach(), same, x.mask, adv, ret)[0].backward()
    assert torch.allclose(same.grad, -adv * x.mask / 13, atol=1e-6)
    return x, r


def part_ppo():
    from trl.core import clip_by_value
    from trl.trainer.ppo_trainer import AdaptiveKLController
    from trl.trainer.utils import RunningMoments

    x, a = ppo(torch.float32)
    _x, d = ppo(torch.float64)
    title(
        "D. PPO as TRL 0.11.4: 3 rows of 8 positions, i = 8b + t; defaults gamma 1, lam .95,"
        " clips .2, vf_coef .1, beta .2"
    )
    emit("ppo_start", PPO_START, "first masked-in position (= query length - 1)")
    emit("ppo_len", PPO_LEN, "response lengths")
    emit("ppo_mask", x.mask)
    emit("ppo_scores", x.scores)
    emit("ppo_old", x.old, "old log-probabilities, -1.6 + 1.2 sin(.4+1.3i)")
    emit("ppo_ref", x.ref, "reference log-probabilities, -1.7 + 1.1 sin(.6+1.25i)")
    emit("ppo_val", x.val, "old values, .5 sin(.2+.9i)")
    emit("ppo_new", x.new, "new log-probabilities, old + .35 sin(1+2.1i)")
    emit("ppo_newval", x.newval, "new values, values + .3 cos(.5+1.7i)")
    print(
        "/* logits [3][8][7]: 2 sin(.1+.77j), reference logits 2 sin(.3+.71j), j = 7i + v,"
        " cast to float32 */"
    )

    def E(name, what=""):
        emit("ppo_" + name, a[name], what, d[name])

    E("mean", "masked_mean of the old values")
    E("var", "masked_var (unbiased) of the old values")
    E("whiten", "masked_whiten of the old values; use only where the mask is 1")
    E("whiten_keep", "the same with shift_mean=False")
    E("plain_whiten", "trl.core.whiten of the three scores (no mask)")
    E("entropies", "entropy_from_logits of the logits")
    for pen in ("kl", "abs", "mse"):
        E("rewards_" + pen, "compute_rewards, kl_penalty %s; use only where the mask is 1" % pen)
    E(
        "rewards_full",
        "compute_rewards, kl_penalty full (between logits and reference logits);"
        " use only where the mask is 1",
    )
    print(
        "/* Advantages (whitened) and returns from golden_ppo_rewards_kl;"
        " use only where the mask is 1.\n"
        "   *_white is whiten_rewards=True.  TRL whitens the padding along with the rest:"
        " a padded position gets\n"
        "   (0 - mean)/std + mean instead of 0, so rows 1 and 2 start their backward recursion"
        " from rewards which are not there. */"
    )
    said = ("", "whiten_rewards", "gamma .9, lam .8", "gamma .9, lam .8, whiten_rewards")
    for tag, what in zip(PPO_SETTINGS, said):
        E("adv" + tag, what)
        E("ret" + tag)
    E("loss_policy", "loss(), with golden_ppo_adv and golden_ppo_ret")
    E("loss_value_scaled", "value loss times vf_coef")
    E("dlogp", "gradient of policy loss + vf_coef * value loss for the new log-probabilities")
    E("dvalue", "... and for the new values")
    E("ratio", "exp(new - old)")
    print("/* golden_ppo_stats: the scalars TRL logs, in this order:")
    for i in range(0, len(STATS), 4):
        print("   " + ", ".join("%d %s" % (j, STATS[j]) for j in range(i, min(i + 4, len(STATS)))))
    print("*/")
    E("stats")

    v = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
    clipped = clip_by_value(v, torch.full((5,), -0.5), torch.full((5,), 1.0))
    emit("ppo_clip_by_value", clipped, "{-2,-.5,0,.5,2} to [-.5, 1]")

    # Running moments over three batches of raw scores, then TRL's scaling of the scores with them.
    batches = [[1.5, -0.75, 0.25], [2.0, 3.0, -1.0, 0.5], [-4.0, 1.0]]
    rm = RunningMoments(types.SimpleNamespace(use_distributed=False))
    rows, scaled, normed = [], [], []
    for b in batches:
        s = torch.tensor(b)
        m, sd = rm.update(s)
        rows.append([float(y) for y in (rm.mean, rm.var, rm.std, rm.count, m, sd)])
        # as in PPOTrainer.step: (use_score_scaling, then with use_score_norm too)
        eps = torch.finfo(s.dtype).eps
        scaled += (s / (rm.std + eps)).tolist()
        normed += ((s - rm.mean) / (rm.std + eps)).tolist()
    emit(
        "moments",
        rows,
        "RunningMoments after {1.5,-.75,.25}, {2,3,-1,.5}, {-4,1}: mean, var, std, count,"
        " batch mean, batch std",
    )
    emit("moments_scaled", scaled, "the 3 + 4 + 2 scores after use_score_scaling")
    emit("moments_normed", normed, "... with use_score_norm as well")

    single, seq, c = [], [], AdaptiveKLController(0.2, 6.0, 10000)
    for kl in (0.0, 6.0, 7.0, 30.0):
        one = AdaptiveKLController(0.2, 6.0, 10000)
        one.update(kl, 128)
        single.append(float(one.value))
        c.update(kl, 128)
        seq.append(float(c.value))
    emit(
        "klctl",
        single,
        "AdaptiveKLController, target 6, horizon 10000, 128 samples:"
        " from .2 after KL 0, 6, 7, 30, each alone",
    )
    emit("klctl_seq", seq, "... one after another")
    # The hand-checked example of the notes: V = .5,.4,.3, r = -.1,0,1.
    v, r = torch.tensor([[0.5, 0.4, 0.3]]), torch.tensor([[-0.1, 0, 1]])
    _v, adv, ret = ppo_trainer().compute_advantages(v, r, torch.ones(1, 3))
    emit("gae_adv", adv[0], "V = {.5,.4,.3}, r = {-.1,0,1}: whitened advantages")
    emit("gae_ret", ret[0], "returns")


# --------------------------------------------------------------------------------------------------
# F. The built-in example of `align explain`, in float64
# --------------------------------------------------------------------------------------------------
# After the prompt four tokens are looked at, as if they were the vocabulary; then two answers of
# four tokens, the chosen and the rejected one.
LOGITS, REF_LOGITS = [2.0, 1.0, 1.5, 0.5], [2.0, 0.8, 1.3, 0.0]
ANSWERS = dict(
    score=[1.0, -0.6],
    logprobs=[[-0.79, -1.80, -0.05, -0.70], [-1.79, -0.60, -0.80, -0.50]],
    ref_logprobs=[[-0.66, -2.30, -0.05, -1.20], [-1.86, -0.70, -0.70, -0.50]],
    values=[[0.40, 0.30, 0.50, 0.50], [0.40, -0.10, -0.20, -0.40]],
    new_logprobs=[[-0.69, -1.70, -0.04, -0.40], [-1.94, -0.65, -0.82, -0.50]],
    new_values=[[0.45, 0.35, 0.60, 0.85], [0.45, -0.15, -0.25, -0.50]],
)


def f64(x, slope=False):
    return torch.tensor(x, dtype=torch.float64, requires_grad=slope)


def answers64():
    return types.SimpleNamespace(**{name: f64(x) for name, x in ANSWERS.items()})


def part_explain():
    """F1: torch's functions, slopes by autograd; the processors of transformers."""
    from torch.distributions import Categorical, kl_divergence
    from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    title("F1. explain: softmax of {2, 1, 1.5, .5}")
    x = f64(LOGITS)
    emit("explain_softmax", x.softmax(0))
    emit("explain_log_sum_exp", x.logsumexp(0))
    emit("explain_entropy", Categorical(logits=x).entropy())

    title("explain: sampling; id 2 was written, penalty 1.2, temperature .7, top_k 3, top_p .9")
    x, ids = x[None], torch.tensor([[2]])
    for name, process in (
        ("penalized", RepetitionPenaltyLogitsProcessor(1.2)),
        ("scaled", TemperatureLogitsWarper(0.7)),
        ("top_k", TopKLogitsWarper(3)),
        ("top_p", TopPLogitsWarper(0.9)),
    ):
        x = process(ids, x.clone())
        emit("explain_" + name, x[0])
    emit("explain_drawn", x[0].softmax(0))
    tied = TopPLogitsWarper(0.5)(None, torch.zeros(1, 4))[0]
    emit("explain_tied", tied, "four equal logits and top_p .5: which two stay")

    title("explain: kl of softmax{2, 1, 1.5, .5} from softmax{2, .8, 1.3, 0}")
    p, q = (Categorical(logits=f64(x)) for x in (LOGITS, REF_LOGITS))
    d = q.logits - p.logits  # Categorical keeps log-probabilities
    k3 = d.exp() - d - 1
    emit("explain_kl", kl_divergence(p, q))
    emit("explain_k1", -d)
    emit("explain_k3", k3)
    emit("explain_mean_k3", p.probs @ k3, "its mean under p: the KL, as that of k1 is")

    title("explain: reward, 1 against -.6: probability, loss, slopes; then margin .5, center .01")
    for name, margin, center in (("reward", 0.0, 0.0), ("reward_margin", 0.5, 0.01)):
        r = f64([1.0, -0.6], True)
        loss = -F.logsigmoid(r[0] - r[1] - margin) + center * r.sum() ** 2
        loss.backward()
        emit("explain_" + name, [torch.sigmoid(r[0] - r[1]).item(), loss.item()] + tolist(r.grad))

    title("explain: reinforce, beta .2, rloo as TRL's RLOOTrainer")
    a = answers64()
    logps = a.logprobs.sum(1).requires_grad_()
    reward = (a.score - 0.2 * (logps - a.ref_logprobs.sum(1))).detach()
    advantage = reward - (reward.sum(0) - reward) / (2 - 1)
    loss = -(advantage * logps).mean()
    loss.backward()
    emit("explain_reinforce_reward", reward)
    emit("explain_reinforce_advantage", advantage)
    emit("explain_reinforce_loss", loss)
    emit("explain_reinforce_dlogps", logps.grad)

    title("explain: exact, beta .5, reference {.2, .3, .5}, rewards {1, -.6, 0}")
    ref, r, beta = Categorical(probs=f64([0.2, 0.3, 0.5])), f64([1.0, -0.6, 0.0]), 0.5
    weight = ref.probs * (r / beta).exp()
    optimum = Categorical(probs=weight)  # divides by the sum
    emit("explain_Z", weight.sum())
    emit("explain_optimum", optimum.probs)
    emit("explain_objective_ref", ref.probs @ r)
    best = optimum.probs @ r - beta * kl_divergence(optimum, ref)
    emit("explain_objective_max", best, "E[r] - beta KL at the optimum; beta log Z is as much")


def explain_ppo():
    """compute_rewards, compute_advantages and loss of TRL's PPOTrainer, after a prompt of three."""
    from trl.core import masked_whiten

    def padded(x):  # what stands before the answers must not matter
        return torch.cat([torch.full((2, 2), 0.3, dtype=torch.float64), x], 1)

    t, a, r = ppo_trainer(), answers64(), {}
    old, ref, values = padded(a.logprobs), padded(a.ref_logprobs), padded(a.values)
    mask = padded(torch.ones(2, 4)).long()
    rewards, _non_score, r["kl"] = t.compute_rewards(a.score, old, ref, mask)
    values, r["advantages"], r["returns"] = t.compute_advantages(values, rewards, mask)
    r["rewards"] = rewards
    r["raw_advantages"] = r["returns"] - values
    assert torch.equal(masked_whiten(r["raw_advantages"], mask), r["advantages"])

    new, newval = (padded(x).requires_grad_() for x in (a.new_logprobs, a.new_values))

    def loss(mask):
        logits = torch.zeros(2, 6, 4, dtype=torch.float64)  # for its entropy alone
        known = (mask, r["advantages"], r["returns"])
        return t.loss(old, values, logits, newval, new, *known)

    policy, value, stats = loss(mask)
    (policy + value).backward()
    r["ratios"], r["dlogprobs"], r["dvalues"] = stats["policy/ratio"], new.grad, newval.grad
    # Of each token: the loss is a mean over the mask, so with a token alone in it, that token's.
    for name in ("token_losses", "clipped", "value_losses"):
        r[name] = torch.zeros(2, 6, dtype=torch.float64)
    for b in range(2):
        for k in range(2, 6):
            one = torch.zeros_like(mask)
            one[b, k] = 1
            token, half_square, stats = loss(one)
            r["token_losses"][b, k], r["clipped"][b, k] = token, stats["policy/clipfrac"]
            r["value_losses"][b, k] = half_square / t.config.vf_coef
    totals = [policy.item(), value.item() / t.config.vf_coef, (policy + value).item()]
    return {name: x.detach()[:, 2:].flatten() for name, x in r.items()}, totals


def part_explain_trl():
    """F2: PPO and DPO of TRL 0.11.4."""
    title("F2. explain: gae and ppo, TRL's defaults; answer 1's four tokens, then answer 2's")
    fields, totals = explain_ppo()
    for name, x in fields.items():
        emit("explain_ppo_" + name, x.long() if name == "clipped" else x)
    emit("explain_ppo_loss", totals, "policy_loss, value_loss, loss")

    from trl.trainer.dpo_trainer import DPOTrainer

    title("explain: dpo, beta .1: loss, dchosen, drejected, reward_chosen, reward_rejected")
    for name, smoothing in (("dpo", 0.0), ("dpo_smoothed", 0.1)):
        t = object.__new__(DPOTrainer)
        t.accelerator = types.SimpleNamespace(device="cpu")
        t.reference_free, t.beta, t.label_smoothing, t.loss_type = False, 0.1, smoothing, "sigmoid"
        t.f_divergence_type, t.f_divergence_params = "reverse_kl", None
        a = answers64()
        policy, ref = a.logprobs.sum(1).requires_grad_(), a.ref_logprobs.sum(1)
        loss, *rewards = t.dpo_loss(policy[:1], policy[1:], ref[:1], ref[1:])
        loss.sum().backward()
        emit("explain_" + name, [loss.item(), *tolist(policy.grad), *(r.item() for r in rewards)])


# --------------------------------------------------------------------------------------------------
# G. GRPO: TRL 1.16's own GRPOTrainer methods, in float64 on float32 inputs
# --------------------------------------------------------------------------------------------------
# Four answers of at most 4 tokens, the formulas of part D with flat index i = 4*b + t; two groups.
GRPO_LEN, GT = [3, 1, 2, 4], 4
GRPO_ADVANTAGES = [0.9, -0.6, -1.3, 0.4]
GRPO_SCORES = [1.0, 2.0, 6.0, 2.0, 0.5, math.nan, 0.5, -1.0]  # two groups of four


def grpo_stub(**kw):
    """What GRPOTrainer's methods ask of self, without a model."""
    from collections import defaultdict

    return types.SimpleNamespace(
        accelerator=types.SimpleNamespace(
            device="cpu",
            num_processes=1,
            process_index=0,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        model=types.SimpleNamespace(training=True, is_gradient_checkpointing=False),
        args=types.SimpleNamespace(
            delta=None, steps_per_generation=1, gradient_accumulation_steps=1,
            per_device_train_batch_size=8, gradient_checkpointing_kwargs=None,
            use_bias_correction_kl=kw.pop("use_bias_correction_kl", False),
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _logs=defaultdict(lambda: defaultdict(list)),
        epsilon_low=0.05, epsilon_high=0.07, max_completion_length=5,
        current_gradient_accumulation_steps=1, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, aux_loss_enabled=False, use_vllm=False,
        _entropy_bonus_enabled=False, **kw,
    )  # fmt: skip


def grpo_loss(loss_type, level, beta, corrected, mask=None):
    """loss, gradient by the 10 log-probabilities, and what is logged."""
    from trl import GRPOTrainer

    s = math.sin
    old = formula((4, GT), lambda i: -1.6 + 1.2 * s(0.4 + 1.3 * i)).double()
    ref = formula((4, GT), lambda i: -1.7 + 1.1 * s(0.6 + 1.25 * i)).double()
    new = formula((4, GT), lambda i: -1.6 + 1.2 * s(0.4 + 1.3 * i) + 0.35 * s(1.0 + 2.1 * i))
    new = new.double().requires_grad_()
    real = torch.zeros(4, GT, dtype=torch.long)
    for b, length in enumerate(GRPO_LEN):
        real[b, :length] = 1
    mask = real if mask is None else mask
    t = grpo_stub(
        loss_type=loss_type, importance_sampling_level=level, beta=beta,
        use_bias_correction_kl=corrected,
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.ones(4, GT).double(), None),
    )  # fmt: skip
    inputs = dict(
        prompt_ids=torch.zeros(4, 1).long(), prompt_mask=torch.ones(4, 1).long(),
        completion_ids=torch.zeros(4, GT).long(), completion_mask=mask,
        advantages=torch.tensor(GRPO_ADVANTAGES, dtype=torch.float64), old_per_token_logps=old,
        ref_per_token_logps=ref, num_items_in_batch=mask.sum(),
    )  # fmt: skip
    loss = GRPOTrainer._compute_loss(t, None, inputs)
    loss.backward()
    logged = {key: values[0] for key, values in t._metrics["train"].items()}
    return loss.item(), new.grad[real.bool()].tolist(), logged


def grpo_advantages(scale):
    """Advantages and what is logged of the scores, by way of a whole rollout."""
    from trl import GRPOTrainer

    n = len(GRPO_SCORES)
    t = grpo_stub(
        scale_rewards=scale, num_generations=4, multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1).double(), reward_func_names=["judge"], beta=0.0,
        environment_factories=None, environments=None, tools=None, mask_truncated_completions=False,
        pad_to_multiple_of=None, log_multimodal=False, num_iterations=1, _pending_extra_logs={},
        _pending_metrics={}, vllm_importance_sampling_correction=False,
        _tokenizer=types.SimpleNamespace(pad_token_id=0),
        _generate=lambda p: ([[1]] * n, [[2]] * n, None, [""] * n, None, {}, None, None),
        _calculate_rewards=lambda *a: torch.tensor(GRPO_SCORES).double()[:, None],
    )  # fmt: skip
    t._logs = dict(prompt=[], completion=[], advantages=[], rewards={"judge": []})
    out = GRPOTrainer._generate_and_score_completions(t, [{"prompt": "a"}] * n)
    logged = {key: values[0] for key, values in t._metrics["train"].items()}
    return out["advantages"], [logged[k] for k in ("reward", "reward_std", "frac_reward_zero_std")]


def part_grpo():
    title("G. GRPO: trl 1.16.0; advantages of two groups of four, the sixth without a score")
    for scale in ("group", "batch", "none"):
        advantages, logged = grpo_advantages(scale)
        emit("grpo_advantages_" + scale, advantages)
        emit("grpo_scores_" + scale, logged, "reward, reward_std, frac_reward_zero_std")

    title("token by token: the batch, masked to each of its tokens")
    masks = []
    for b, length in enumerate(GRPO_LEN):
        for t in range(length):
            mask = torch.zeros(4, GT, dtype=torch.long)
            mask[b, t] = 1
            masks.append(mask)
    for corrected in (False, True):
        # a mean over an answer without a token is NaN, and counts in no metric
        logged = [grpo_loss("bnpo", "token", 0.04, corrected, mask)[2] for mask in masks]
        emit("grpo_kl%s" % ("_corrected" * corrected), [m["kl"] for m in logged])
    for key in ("low", "high"):
        emit("grpo_clipped_" + key, [int(m["clip_ratio/%s_mean" % key]) for m in logged])

    title("loss; gradient by each log-probability")
    keys = ["kl"] + ["clip_ratio/" + key for key in ("low_mean", "high_mean", "region_mean")]
    keys += ["clip_ratio/low_min", "clip_ratio/high_max"]
    for level in ("token", "sequence"):
        for beta, corrected in ((0.0, False), (0.04, False), (0.04, True)):
            name = "%s%s%s" % (level, "_kl" * (beta > 0), "_corrected" * corrected)
            for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
                loss, gradient, logged = grpo_loss(loss_type, level, beta, corrected)
                emit("grpo_%s_%s" % (loss_type, name), [loss, *gradient])
            if beta > 0:
                emit("grpo_logged_" + name, [logged[key] for key in keys], ", ".join(keys))


# --------------------------------------------------------------------------------------------------
def main():
    about = "print golden numbers for test_align.c as C (see the top of this file)"
    ap = argparse.ArgumentParser(description=about)
    about = "Python with trl 0.11.4 (parts C, D and F2)"
    ap.add_argument("--trl-python", default="/tmp/venv_trl011/bin/python", help=about)
    about = "parts C, D and F2 in this very Python (used internally)"
    ap.add_argument("--only-trl", action="store_true", help=about)
    opt = ap.parse_args()
    import transformers

    versions = "torch %s, transformers %s" % (torch.__version__, transformers.__version__)
    if opt.only_trl:
        import trl

        print("\n/* %s, trl %s */" % (versions, trl.__version__))
        part_dpo()
        part_ppo()
        part_explain_trl()
        return
    print("/* made by docs/tools/golden.py; %s */" % versions)
    part_forward_backward()
    part_adamw()
    part_reward()
    part_generate()
    part_ops()
    part_schedules()
    part_explain()
    part_grpo()
    sys.stdout.flush()
    if not os.path.exists(opt.trl_python):
        sys.exit("golden.py: no %s; the top of this file says how to make it" % opt.trl_python)
    subprocess.run([opt.trl_python, os.path.abspath(__file__), "--only-trl"], check=True)


if __name__ == "__main__":
    main()
