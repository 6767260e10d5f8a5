#!/usr/bin/env python3
"""bench_torch.py - how fast PyTorch does what align.c does, on this machine.

    python3 docs/bench_torch.py                      # training step, GPT-2 124M, batch 4 x 64 tokens, 2 threads
    python3 docs/bench_torch.py --gen                # generation with KV cache: 48 tokens after 32, batch 1 and 16
    python3 docs/bench_torch.py --n_layer 4 --n_embd 256 --vocab 5000 --batch 8 --length 128 --steps 10

Made for torch 2.13.0 (CPU) and transformers 5.23.0.  Eager PyTorch (no torch.compile), float32, dropout 0, random
weights and random tokens: the weights do not influence the speed.  A training step is forward with loss, backward
and torch.optim.AdamW (lr 1e-4, otherwise its defaults, which on the CPU means a loop over the tensors, neither
foreach nor fused; --fused is the fast one), no gradient clipping unless --clip is given.  One step before the timed
ones is not counted.

On a shared machine look at "cpu x wall" in the output: processor seconds used per second of wall-clock time.  If it is
well below the number of threads, the program did not have its cores, and the figure says little: repeat it.  Some
virtual machines pack the threads of a process onto one of two idle cores for seconds on end (cpu 1.00 x wall with 2
threads), so the threads are bound to one core each unless --no-bind is given; a C program measured against this one
needs the same (OMP_PROC_BIND=true OMP_PLACES=cores).
"""
import argparse
import os
import statistics
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def arguments():
    ap = argparse.ArgumentParser(description="times a GPT-2 training step or generation in PyTorch on the CPU")
    ap.add_argument("--gen", action="store_true", help="time generation instead of training")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--no-bind", action="store_true", help="let the kernel place the threads (see above)")
    ap.add_argument("--steps", type=int, default=3, help="timed repetitions")
    ap.add_argument("--batch", type=int, nargs="*", help="training: 4; generation: 1 16 (several are possible)")
    ap.add_argument("--length", type=int, default=64, help="tokens per training sequence")
    ap.add_argument("--prompt", type=int, default=32, help="generation: prompt tokens")
    ap.add_argument("--new", type=int, default=48, help="generation: new tokens")
    ap.add_argument("--n_layer", type=int, default=12)
    ap.add_argument("--n_embd", type=int, default=768)
    ap.add_argument("--n_head", type=int, help="default n_embd / 64, at least 1")
    ap.add_argument("--vocab", type=int, default=50257)
    ap.add_argument("--attn", choices=["sdpa", "eager"], default="sdpa", help="attention implementation of transformers")
    ap.add_argument("--clip", type=float, default=0.0, help="clip the gradient norm to this; 0 = no clipping")
    ap.add_argument("--fused", action="store_true", help="AdamW(fused=True)")
    return ap.parse_args()


def main():
    opt = arguments()
    os.environ["OMP_NUM_THREADS"] = str(opt.threads)
    if not opt.no_bind:
        os.environ.setdefault("OMP_PROC_BIND", "true")
        os.environ.setdefault("OMP_PLACES", "cores")
    import torch
    import transformers
    torch.set_num_threads(opt.threads)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=opt.vocab, n_layer=opt.n_layer, n_embd=opt.n_embd, n_head=opt.n_head or max(1, opt.n_embd // 64),
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=opt.vocab - 1, eos_token_id=opt.vocab - 1)
    config._attn_implementation = opt.attn
    model = transformers.GPT2LMHeadModel(config)
    size = sum(p.numel() for p in model.parameters())
    print("torch %s, transformers %s, %d threads, %s attention, %.1fM parameters" % (
        torch.__version__, transformers.__version__, torch.get_num_threads(), opt.attn, size / 1e6), flush=True)

    def report(what, tokens, seconds, cpu):
        best, median = min(seconds), statistics.median(seconds)
        print("%s: best of %d %.3f s = %.1f tokens/s, median %.3f s = %.1f tokens/s (cpu %.2f x wall)" % (
            what, len(seconds), best, tokens / best, median, tokens / median, cpu / sum(seconds)), flush=True)

    if opt.gen:
        model.eval()
        for batch in opt.batch or [1, 16]:
            prompt = torch.randint(0, opt.vocab - 1, (batch, opt.prompt))
            seconds, cpu = [], 0.0
            for i in range(opt.steps + 1):                     # the first run warms up
                t, c = time.perf_counter(), time.process_time()
                with torch.no_grad():
                    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                                         max_new_tokens=opt.new, min_new_tokens=opt.new, pad_token_id=opt.vocab - 1)
                if i > 0:
                    seconds.append(time.perf_counter() - t)
                    cpu += time.process_time() - c
            assert out.shape == (batch, opt.prompt + opt.new)
            report("generate, batch %d, %d tokens after %d" % (batch, opt.new, opt.prompt), batch * opt.new, seconds, cpu)
        return

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=opt.fused or None)
    for batch in opt.batch or [4]:
        ids = torch.randint(0, opt.vocab, (batch, opt.length))
        seconds, losses, cpu, phase = [], [], 0.0, [[], [], []]
        for i in range(opt.steps + 1):                         # the first step warms up
            t, c = time.perf_counter(), time.process_time()
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(loss.item())
            t1 = time.perf_counter()
            loss.backward()
            t2 = time.perf_counter()
            if opt.clip > 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), opt.clip)
            optimizer.step()
            t3 = time.perf_counter()
            if i > 0:
                seconds.append(t3 - t)
                cpu += time.process_time() - c
                for p, x in zip(phase, (t1 - t, t2 - t1, t3 - t2)):
                    p.append(x)
        report("train, batch %d x %d" % (batch, opt.length), batch * opt.length, seconds, cpu)
        print("  best forward %.3f s, backward %.3f s, optimizer %.3f s" % tuple(min(p) for p in phase))
        print("  losses " + " ".join("%.4f" % x for x in losses))


if __name__ == "__main__":
    main()
