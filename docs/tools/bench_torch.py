#!/usr/bin/env python3
"""bench_torch.py - how fast PyTorch, transformers, TRL and llm.c do align.c's work on this machine.

    python3 docs/tools/bench_torch.py [MODE] [FLAGS]

MODE is one of these; without one, a training step of GPT-2 124M, batch 4 x 64 tokens, 2 threads:
    --gen          generation with KV cache: 48 tokens after 32, batch 1 and 16
    --dpo          DPO step, 4 pairs of 64 tokens, 16 of them the shared prompt
    --ppo          TRL 0.11.4's PPOTrainer, 16 queries, 10 new tokens each
    --llmc DIR     llm.c's train_gpt2 on the training step, see below
The other flags give shapes and repetitions (--help lists them), or the figures as a JSON object in
the last line of the output (--json):
    --n_layer 4 --n_embd 256 --vocab 5000 --batch 8 --length 128 --steps 10
    --ppo --n_layer 2 --n_embd 128 --vocab 2048 --queries 64

Made for torch 2.13.0 (CPU) and transformers 5.23.0. Eager PyTorch (no torch.compile), float32,
dropout 0, random weights and random tokens: the weights do not influence the speed. A training step
is forward with loss, backward and torch.optim.AdamW (lr 1e-4, otherwise its defaults, which on the
CPU means a loop over the tensors, neither foreach nor fused; --fused is the fast one), no gradient
clipping unless --clip is given. One step before the timed ones is not counted.

--dpo: policy in training mode, frozen copy as reference, sigmoid loss, beta 0.1, AdamW as in
training. --batch is the number of pairs; chosen and rejected are one batch (4 pairs: 8 x 64
tokens). Log-softmax of all positions, as in TRL, then the sum over the completion. "reference
computed" runs the reference in each step, "cached" once, before.

--ppo: with the wrong trl or transformers the script starts itself again with --trl-python
(docs/tools/golden.py tells how to make it). Queries of 2, 3, .. 7, 2, .. random tokens, --new
tokens after each (top_k 0, top_p 1, never ended early), random scores, PPOTrainer.step with 4
epochs, mini-batches of --mini-batch (default: all), torch.optim.Adam, lr 1.41e-5. "generate, one
query at a time" is the loop of TRL's gpt2-sentiment example; "generate, one batch" gives all
queries to PPOTrainer.generate at once. Tokens/s of all PPO lines: new tokens, --queries x --new.

--llmc DIR: train_gpt2.c of github.com/karpathy/llm.c (tried: commit f1e2ace) is for the CPU, always
4 x 64 tokens:
    cd DIR; cc -O3 -fopenmp -DOMP train_gpt2.c -o train_gpt2_O3 -lm
                           # plain; time it with --llmc DIR/train_gpt2_O3
    cd DIR; make train_gpt2 NO_MULTI_GPU=1
                           # its own flags: cc -Ofast -march=native -fopenmp -DOMP ...
The script writes what it reads (random weights of the given shape in gpt2_124M.bin, 0.5 GB for
124M; random tokens in dev/data/tinyshakespeare; a dummy gpt2_tokenizer.bin; files that are not the
script's own stay), runs it and reads its "took ... ms" lines: training steps with AdamW, not the
validation and sampling in between. Step 0 is not counted; after --steps more (at most 40) it is
ended. Needs numpy, not torch.

On a shared machine look at "cpu x wall" in the output: processor seconds used per second of
wall-clock time. If it is well below the number of threads, the program did not have its cores, and
the figure says little: repeat it. Some virtual machines pack the threads of a process onto one of
two idle cores for seconds on end (cpu 1.00 x wall with 2 threads), so the threads are bound to one
core each unless --no-bind is given; a C program measured against this one needs the same
(OMP_PROC_BIND=true OMP_PLACES=cores).
"""

import argparse
import copy
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
FIGURES = []  # what report() has printed, for --json


def arguments():
    ap = argparse.ArgumentParser(
        description="times GPT-2 training, generation, DPO and PPO in PyTorch on the CPU"
    )
    mode = ap.add_mutually_exclusive_group()
    for name, what in (
        ("gen", "generation"),
        ("dpo", "a DPO step"),
        ("ppo", "TRL's PPOTrainer: generate and step"),
    ):
        mode.add_argument(
            "--" + name, dest="mode", action="store_const", const=name, help="time %s" % what
        )
    mode.add_argument(
        "--llmc", metavar="DIR", help="time llm.c: the folder of train_gpt2, or the program itself"
    )
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument(
        "--no-bind", action="store_true", help="let the kernel place the threads (see above)"
    )
    ap.add_argument("--steps", type=int, default=3, help="timed repetitions")
    ap.add_argument(
        "--batch",
        type=int,
        nargs="*",
        help="training, DPO: 4; generation: 1 16 (several are possible)",
    )
    ap.add_argument("--length", type=int, default=64, help="tokens per training sequence")
    ap.add_argument("--prompt", type=int, help="prompt tokens (generation: 32, DPO: 16)")
    ap.add_argument("--new", type=int, help="new tokens (generation: 48, PPO: 10)")
    ap.add_argument("--n_layer", type=int, default=12)
    ap.add_argument("--n_embd", type=int, default=768)
    ap.add_argument("--n_head", type=int, help="default n_embd / 64, at least 1")
    ap.add_argument("--vocab", type=int, default=50257)
    ap.add_argument(
        "--attn", choices=["sdpa", "eager"], default="sdpa", help="attention of transformers"
    )
    ap.add_argument(
        "--clip",
        type=float,
        default=0.0,
        help="training: clip the gradient norm to this; 0 = no clipping",
    )
    ap.add_argument("--fused", action="store_true", help="training, DPO: AdamW(fused=True)")
    ap.add_argument("--queries", type=int, default=16, help="PPO: batch size")
    ap.add_argument("--mini-batch", type=int, help="PPO: mini-batch size, default --queries")
    ap.add_argument(
        "--trl-python", default="/tmp/venv_trl011/bin/python", help="a Python that has trl 0.11.4"
    )
    ap.add_argument(
        "--json", action="store_true", help="print the figures as JSON in the last line"
    )
    opt = ap.parse_args()
    opt.n_head = opt.n_head or max(1, opt.n_embd // 64)
    opt.mode = "llmc" if opt.llmc else opt.mode or "train"
    return opt


def report(what, tokens, seconds, cpu):
    best, median = min(seconds), statistics.median(seconds)
    print(
        "%s: best of %d %.3f s = %.1f tokens/s, median %.3f s = %.1f tokens/s (cpu %.2f x wall)"
        % (what, len(seconds), best, tokens / best, median, tokens / median, cpu / sum(seconds)),
        flush=True,
    )
    FIGURES.append(
        dict(
            what=what,
            tokens=tokens,
            best_s=best,
            median_s=median,
            best_tokens_per_s=tokens / best,
            median_tokens_per_s=tokens / median,
            cpu_x_wall=cpu / sum(seconds),
        )
    )


def clock():
    return time.perf_counter(), time.process_time()


def timed(run, times):
    """Calls run(i) once to warm up and then `times` times: the seconds of each, the processor
    seconds of all.
    """
    c = [clock()]
    for i in range(times + 1):
        run(i)
        c.append(clock())
    return [b[0] - a[0] for a, b in zip(c[1:], c[2:])], c[-1][1] - c[1][1]


def bench_train(opt, torch, model):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=opt.fused or None)
    for batch in opt.batch or [4]:
        ids = torch.randint(0, opt.vocab, (batch, opt.length))
        losses, phase = [], []

        def step(i):
            t = time.perf_counter()
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(loss.item())
            t1 = time.perf_counter()
            loss.backward()
            t2 = time.perf_counter()
            if opt.clip > 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), opt.clip)
            optimizer.step()
            phase.append((t1 - t, t2 - t1, time.perf_counter() - t2))

        report(
            "train, batch %d x %d" % (batch, opt.length),
            batch * opt.length,
            *timed(step, opt.steps)
        )
        print(
            "  best forward %.3f s, backward %.3f s, optimizer %.3f s"
            % tuple(min(p) for p in zip(*phase[1:]))
        )
        print("  losses " + " ".join("%.4f" % x for x in losses))


def bench_gen(opt, torch, model):
    model.eval()
    length, new = opt.prompt or 32, opt.new or 48
    for batch in opt.batch or [1, 16]:
        prompt = torch.randint(0, opt.vocab - 1, (batch, length))

        def generate(i):
            with torch.no_grad():
                out = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=False,
                    use_cache=True,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    pad_token_id=opt.vocab - 1,
                )
            assert out.shape == (batch, length + new)

        report(
            "generate, batch %d, %d tokens after %d" % (batch, new, length),
            batch * new,
            *timed(generate, opt.steps)
        )


def bench_dpo(opt, torch, model):
    prompt, beta = opt.prompt or 16, 0.1
    assert 0 < prompt < opt.length
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=opt.fused or None)
    for pairs in opt.batch or [4]:
        # first the chosen, then the rejected
        ids = torch.randint(0, opt.vocab, (2 * pairs, opt.length))
        ids[pairs:, :prompt] = ids[:pairs, :prompt]
        losses = []

        def logprob(m):
            logp = m(input_ids=ids).logits[:, :-1].log_softmax(-1)
            return logp.gather(2, ids[:, 1:, None]).squeeze(2)[:, prompt - 1 :].sum(1)

        def step(ref):
            optimizer.zero_grad()
            reward = beta * (logprob(model) - ref)
            loss = -torch.nn.functional.logsigmoid(reward[:pairs] - reward[pairs:]).mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()

        ref = torch.no_grad()(logprob)
        what = "dpo, %d pairs x %d, reference " % (pairs, opt.length)
        tokens, cached = ids.numel(), ref(reference)
        report(what + "computed", tokens, *timed(lambda i: step(ref(reference)), opt.steps))
        report(what + "cached", tokens, *timed(lambda i: step(cached), opt.steps))
        print("  losses " + " ".join("%.4g" % x for x in losses))


def start_trl_python(opt):
    """Replaces this process by --trl-python unless this Python has the right trl; before torch is
    imported, because the binding of the threads would be inherited.
    """
    version = importlib.metadata.version
    try:
        if version("trl").startswith("0.11.") and version("transformers").startswith("4."):
            return
    except importlib.metadata.PackageNotFoundError:
        pass
    if os.environ.get("BENCH_TORCH_TRL") or not os.path.exists(opt.trl_python):
        sys.exit(
            "%s is no Python with trl 0.11.4 and transformers 4.45.2: see docs/tools/golden.py"
            % opt.trl_python
        )
    os.environ["BENCH_TORCH_TRL"] = "1"
    os.execv(opt.trl_python, [opt.trl_python, os.path.abspath(__file__)] + sys.argv[1:])


def bench_ppo(opt, torch, model):
    warnings.filterwarnings("ignore")
    import tokenizers
    import transformers
    import trl

    end, new, n, rounds = opt.vocab - 1, opt.new or 10, opt.queries, []
    words = {"t%d" % i: i for i in range(end)}  # TRL wants a tokenizer, but here only pads with it
    words["<end>"] = end
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(
            tokenizers.models.WordLevel(words, unk_token="<end>")
        ),
        eos_token="<end>",
        pad_token="<end>",
    )
    model.config.summary_dropout_prob = 0.0  # of the value head
    policy = trl.AutoModelForCausalLMWithValueHead(model)
    policy.is_peft_model = False  # otherwise set by from_pretrained
    config = trl.PPOConfig(
        batch_size=n,
        mini_batch_size=opt.mini_batch or n,
        gradient_accumulation_steps=1,
        ppo_epochs=4,
        learning_rate=1.41e-5,
    )
    trainer = trl.PPOTrainer(config, policy, trl.create_reference_model(policy), tokenizer)
    sampling = dict(
        min_length=-1,
        min_new_tokens=new,
        max_new_tokens=new,
        top_k=0,
        top_p=1.0,
        do_sample=True,
        pad_token_id=end,
    )
    queries = [torch.randint(0, end, (2 + i % 6,)) for i in range(n)]
    for i in range(opt.steps + 1):  # the first round warms up
        c = [clock()]
        for q in queries:
            assert trainer.generate(q, **sampling).shape == (1, len(q) + new)
        c.append(clock())
        responses = trainer.generate(queries, batch_size=n, return_prompt=False, **sampling)
        c.append(clock())
        assert len(responses) == n and all(len(r) == new for r in responses)
        trainer.step(queries, responses, list(torch.randn(n)))
        c.append(clock())
        rounds.append([(b[0] - a[0], b[1] - a[1]) for a, b in zip(c, c[1:])])
    for what, parts in (
        ("generate, one query at a time", [0]),
        ("generate, one batch", [1]),
        ("step", [2]),
        ("sum, one query at a time", [0, 2]),
        ("sum, one batch", [1, 2]),
    ):
        report(
            "ppo, %d queries, %s" % (n, what),
            n * new,
            [sum(r[p][0] for p in parts) for r in rounds[1:]],
            sum(r[p][1] for r in rounds[1:] for p in parts),
        )


def llmc_files(opt, folder):
    """Writes what train_gpt2 reads. Each file begins with 256 int32, the last of them unused: there
    we mark ours. A file without the mark is somebody's and stays.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    L, C, V, T = opt.n_layer, opt.n_embd, opt.vocab, 1024

    def write(name, header, *blocks):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.exists(path) and np.fromfile(path, np.int32, 256)[-1] != -1:
            print("%s is kept: this script did not write it" % path)
            return
        with open(path, "wb") as f:
            f.write(np.array(header + [0] * (255 - len(header)) + [-1], np.int32))
            for b in blocks:
                f.write(b)

    def normal(*shape):
        return 0.02 * rng.standard_normal(shape, np.float32)

    def linear(inputs, outputs):  # of all layers
        return normal(L, outputs, inputs), np.zeros((L, outputs), np.float32)

    ln = np.ones((L, C), np.float32), np.zeros((L, C), np.float32)
    write(
        "gpt2_124M.bin",
        [20240326, 3, T, V, L, opt.n_head, C, V + -V % 128],
        normal(V, C),
        np.zeros((-V % 128, C), np.float32),
        normal(T, C),
        *ln,
        *linear(C, 3 * C),
        *linear(C, C),
        *ln,
        *linear(C, 4 * C),
        *linear(4 * C, C),
        ln[0][0],
        ln[1][0]
    )
    # each token: its length, its bytes
    write("gpt2_tokenizer.bin", [20240328, 2, V, V - 1], b"\x01." * V)
    for part in "train", "val":
        tokens = rng.integers(0, V, 41 * 256 + 1).astype(np.uint16)
        write(
            "dev/data/tinyshakespeare/tiny_shakespeare_%s.bin" % part,
            [20240520, 1, len(tokens)],
            tokens,
        )


def bench_llmc(opt):
    program = os.path.abspath(opt.llmc)
    if os.path.isdir(program):
        program = os.path.join(program, "train_gpt2")
    if not os.path.isfile(program) or opt.vocab > 65536:  # its token files hold 16-bit numbers
        sys.exit(
            "build %s first (see the beginning of this file); --vocab is at most 65536" % program
        )
    llmc_files(opt, os.path.dirname(program))
    terminal, output = os.openpty()  # on a terminal C's stdout comes line by line
    child = subprocess.Popen([program], cwd=os.path.dirname(program), stdout=output, stderr=output)
    os.close(output)

    def child_clock():
        # utime and stime: 12th and 13th after the name
        with open("/proc/%d/stat" % child.pid) as f:
            ticks = f.read().rsplit(")", 1)[1].split()[11:13]
        return time.perf_counter(), sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    steps, seconds, losses, text = min(opt.steps, 40), [], [], ""
    try:
        with os.fdopen(terminal, errors="replace") as f:
            for text in f:
                if text.startswith("num_parameters"):
                    print(
                        "%s, %d threads, %.1fM parameters"
                        % (program, opt.threads, int(text.split()[1]) / 1e6)
                    )
                m = re.match(r"step \d+: train loss (\S+) \(took (\S+) ms\)", text)
                if m:
                    losses.append(m[1])
                    seconds.append((float(m[2]) / 1000, *child_clock()))
                    if len(seconds) > steps:
                        break
    except OSError:  # the program has closed the terminal
        pass
    finally:
        child.terminate()
        child.wait()
    if len(seconds) <= steps:
        sys.exit("llm.c ended early: " + text)
    rest = [s[0] for s in seconds[1:]]
    (_, wall0, cpu0), (_, wall1, cpu1) = seconds[0], seconds[-1]
    report("llm.c train, batch 4 x 64", 4 * 64, rest, (cpu1 - cpu0) / (wall1 - wall0) * sum(rest))
    print("  losses " + " ".join(losses))


def main():
    opt = arguments()
    os.environ["OMP_NUM_THREADS"] = str(opt.threads)
    if not opt.no_bind:
        os.environ.setdefault("OMP_PROC_BIND", "true")
        os.environ.setdefault("OMP_PLACES", "cores")
    told = ("mode", "threads", "steps", "n_layer", "n_embd", "n_head", "vocab")
    about = {k: getattr(opt, k) for k in told}
    if opt.llmc:
        bench_llmc(opt)
    else:
        if opt.mode == "ppo":
            start_trl_python(opt)
        import torch
        import transformers

        torch.set_num_threads(opt.threads)
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=opt.vocab,
            n_layer=opt.n_layer,
            n_embd=opt.n_embd,
            n_head=opt.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=opt.vocab - 1,
            eos_token_id=opt.vocab - 1,
        )
        config._attn_implementation = opt.attn
        model = transformers.GPT2LMHeadModel(config)
        size = sum(p.numel() for p in model.parameters())
        about.update(
            torch=torch.__version__, transformers=transformers.__version__, parameters=size
        )
        print(
            "torch %s, transformers %s, %d threads, %s attention, %.1fM parameters"
            % (
                torch.__version__,
                transformers.__version__,
                torch.get_num_threads(),
                opt.attn,
                size / 1e6,
            ),
            flush=True,
        )
        modes = dict(train=bench_train, gen=bench_gen, dpo=bench_dpo, ppo=bench_ppo)
        modes[opt.mode](opt, torch, model)
    if opt.json:
        print(json.dumps(dict(about, figures=FIGURES)))


if __name__ == "__main__":
    main()
