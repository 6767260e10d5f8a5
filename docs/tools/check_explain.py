#!/usr/bin/env python3
"""check_explain.py [ALIGN]: does `align explain` compute what its formulas say?

    make && python3 docs/tools/check_explain.py

Seconds; ends with 'N passed, N failed'; Python 3.8 or later and nothing else. Computes every field
of the topics softmax, sampling, kl, reward, reinforce, gae, ppo, dpo and exact in double, written
from the formulas alone, and compares them with `explain TOPIC --json --example FILE`: for the
built-in example, and for random ones of other lengths and settings, on both sides of each clip,
with ties. These formulas in turn are held to the numbers of TRL, torch and transformers that
test_align.c has (golden_explain_*), and their slopes to central differences. Then: output as input
gives the same output; what is left out keeps its built-in value; what cannot be is refused by a
line that names the field; no line of the text is wider than 80 columns, in both languages.

TOLERANCE. align reads and keeps most numbers as floats, which have 24 bits. So a number may differ
by 1e-6 of itself, plus what the result moves by if each number that goes in is off by 2^-22 of
itself: two bits more than its own rounding, for that of the steps between. Where logits are
subtracted from a log-sum-exp of their size, the rounding of that, 2^-22 of the largest, counts too;
and where whitened advantages, of size 1, add up to a policy_loss near 0, the rounding of these.
An example in which such a change turns a clip, a cut or a draw around is drawn anew.
"""

import copy
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
EXAMPLES, COLUMNS, FLOAT = 20, 80, 2.0**-22
rng = random.Random(16)


# ---- The formulas: a topic's input -> the fields that explain adds


def log_softmax(x):
    return [v - log_sum_exp(x) for v in x]


def log_sum_exp(x):
    return max(x) + math.log(sum(math.exp(v - max(x)) for v in x))


def softmax(x):
    return [math.exp(v) for v in log_softmax(x)]


def log_sigmoid(x):
    return min(x, 0) - math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return math.exp(log_sigmoid(x))


def clip(x, low, high):
    return min(max(x, low), high)


def mean(x):
    return sum(x) / len(x)


def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


def of_softmax(e):
    x, most = [v / e["temperature"] for v in e["logits"]], e["logits"].index(max(e["logits"]))
    entropy = -dot(softmax(x), log_softmax(x))
    return dict(probabilities=softmax(x), log_sum_exp=log_sum_exp(x), entropy=entropy, argmax=most)


def top_k(x, k):
    """None where a number is below the k-th largest; what equals that stays."""
    least = sorted(x, reverse=True)[min(k, len(x)) - 1] if k else -math.inf
    return [v if v >= least else None for v in x]


def top_p(x, p):
    """transformers: in ascending order, cut while the mass so far is at most 1 - p, not the last.

    Of equal numbers those with the smaller ids are cut first.
    """
    kept = [i for i in range(len(x)) if x[i] is not None]
    share = dict(zip(kept, softmax([x[i] for i in kept])))
    below, result = 0, list(x)
    for i in sorted(kept, key=lambda i: (x[i], i))[:-1]:
        below += share[i]
        if p < 1 and below <= 1 - p:
            result[i] = None
    return result


def of_sampling(e):
    penalty, x, below = e["repetition_penalty"], list(e["logits"]), 0
    for i in set(e["ids"]):
        x[i] = x[i] * penalty if x[i] < 0 else x[i] / penalty
    r = dict(penalized=x, scaled=[v / e["temperature"] for v in x])
    r["after_top_k"] = top_k(r["scaled"], e["top_k"])
    r["after_top_p"] = top_p(r["after_top_k"], e["top_p"])
    left = softmax([v for v in r["after_top_p"] if v is not None])
    r["probabilities"] = [0 if v is None else left.pop(0) for v in r["after_top_p"]]
    for i, p in enumerate(r["probabilities"]):
        below += p
        if e["u"] < below:
            break
    return dict(r, token=i)


def of_kl(e):
    p, q = log_softmax(e["p_logits"]), log_softmax(e["q_logits"])
    k1 = [a - b for a, b in zip(p, q)]
    k3 = [math.expm1(-d) + d for d in k1]
    mean_k1, mean_k3 = (dot([math.exp(a) for a in p], each) for each in (k1, k3))
    return dict(kl=mean_k1, k1=k1, k3=k3, mean_k1=mean_k1, mean_k3=mean_k3)


def of_reward(e):
    difference, both = e["chosen"] - e["rejected"], e["chosen"] + e["rejected"]
    center = e["center_rewards_coefficient"]
    pull, slope = 2 * center * both, -sigmoid(e["margin"] - difference)
    return dict(
        probability=sigmoid(difference),
        loss=-log_sigmoid(difference - e["margin"]) + center * both**2,
        dchosen=slope + pull,
        drejected=-slope + pull,
    )


def total(x):
    return sum(x) if isinstance(x, list) else x


def of_reinforce(e, A=None):
    """A: advantages that are already known."""
    logp, ref = ([total(a[name]) for a in e["answers"]] for name in ("logps", "ref_logps"))
    R = [a["score"] - e["beta"] * (x - y) for a, x, y in zip(e["answers"], logp, ref)]
    n = len(R)
    base = dict(none=lambda r: 0, mean=lambda r: mean(R), rloo=lambda r: (sum(R) - r) / (n - 1))
    A = A or [r - base[e["baseline"]](r) for r in R]
    each = [dict(reward=r, advantage=a, dlogps=-a / n) for r, a in zip(R, A)]
    return dict(answers=each, loss=-dot(A, logp) / n)


def gae(rewards, values, gamma, lam):
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, values[1:] + [0])]
    # no recursion: A_t is a sum over all later surprises
    later = [deltas[t:] for t in range(len(deltas))]
    A = [sum((gamma * lam) ** k * d for k, d in enumerate(ds)) for ds in later]
    return dict(deltas=deltas, raw_advantages=A, returns=[a + v for a, v in zip(A, values)])


def of_gae(e):
    each = [gae(a["rewards"], a["values"], e["gamma"], e["lam"]) for a in e["answers"]]
    A = [x for r in each for x in r["raw_advantages"]]
    m, n = mean(A), len(A)
    variance = sum((x - m) ** 2 for x in A) / (n - 1) if n > 1 else 0
    for r in each:
        r["advantages"] = [(x - m) / math.sqrt(variance + 1e-8) for x in r["raw_advantages"]]
    return dict(answers=each)


def ppo_token(e, old, new, advantage, n):
    """Ratio, is it clipped, loss, d loss / d new of the mean over n tokens."""
    ratio = math.exp(new - old)
    plain = -advantage * ratio
    cut = -advantage * clip(ratio, 1 - e["cliprange"], 1 + e["cliprange"])
    return ratio, cut > plain, max(plain, cut), 0 if cut > plain else plain / n


def ppo_value(e, old, new, target, n):
    """Half of the larger square, d loss / d new."""
    cut = clip(new, old - e["cliprange_value"], old + e["cliprange_value"])
    plain_square, cut_square = (new - target) ** 2, (cut - target) ** 2
    slope = 0 if cut_square > plain_square else e["vf_coef"] * (new - target) / n
    return max(plain_square, cut_square) / 2, slope


def of_ppo(e):
    each = []
    for a in e["answers"]:
        kl = [lp - ref for lp, ref in zip(a["logprobs"], a["ref_logprobs"])]
        rewards = [-e["kl_coef"] * k for k in kl]
        rewards[-1] += a["score"]
        each.append(dict(kl=kl, rewards=rewards))
    known = [dict(rewards=r["rewards"], values=a["values"]) for r, a in zip(each, e["answers"])]
    n = sum(len(r["kl"]) for r in each)
    for r, a, more in zip(each, e["answers"], of_gae(dict(e, answers=known))["answers"]):
        r.update(more)
        tokens = zip(a["logprobs"], a["new_logprobs"], r["advantages"])
        columns = zip(*(ppo_token(e, *token, n) for token in tokens))
        names = ("ratios", "clipped", "token_losses", "dlogprobs")
        r.update((name, list(column)) for name, column in zip(names, columns))
        tokens = zip(a["values"], a["new_values"], r["returns"])
        columns = zip(*(ppo_value(e, *token, n) for token in tokens))
        r.update((k, list(c)) for k, c in zip(("value_losses", "dvalues"), columns))
    names = ("token_losses", "value_losses")
    policy, value = (mean([x for r in each for x in r[name]]) for name in names)
    loss = policy + e["vf_coef"] * value
    return dict(answers=each, policy_loss=policy, value_loss=value, loss=loss)


def grpo_token(e, old, new, ref, advantage):
    """Ratio, is it clipped, k3, loss, d loss / d new."""
    ratio, d = math.exp(new - old), ref - new
    plain = -advantage * ratio
    cut = -advantage * clip(ratio, 1 - e["epsilon"], 1 + e["epsilon_high"])
    weight = ratio if e["use_bias_correction_kl"] else 1
    kl = weight * (math.expm1(d) - d)
    slope = 0 if cut > plain else plain
    slope += e["beta"] * (weight * -math.expm1(d) + (kl if e["use_bias_correction_kl"] else 0))
    return ratio, cut > plain, kl, max(plain, cut) + e["beta"] * kl, slope


def of_grpo(e, A=None):
    """A: the advantages, where only the loss is wanted."""
    scores, n = [a["score"] for a in e["answers"]], len(e["answers"])
    m = mean(scores)
    std = math.sqrt(sum((x - m) ** 2 for x in scores) / (n - 1))
    divisor = 1 if e["scale_rewards"] == "none" else std + 1e-4
    A = A or [(x - m) / divisor for x in scores]
    total, each, loss = sum(len(a["logprobs"]) for a in e["answers"]), [], 0
    for a, advantage in zip(e["answers"], A):
        share = dict(
            grpo=1 / (n * len(a["logprobs"])), dr_grpo=1 / (n * e["max_completion_length"])
        ).get(e["loss_type"], 1 / total)
        tokens = zip(a["logprobs"], a["new_logprobs"], a["ref_logprobs"])
        columns = list(zip(*(grpo_token(e, *token, advantage) for token in tokens)))
        loss += share * sum(columns[3])
        names = ("ratios", "clipped", "kl", "token_losses")
        each.append(dict(zip(names, map(list, columns)), advantage=advantage))
        each[-1]["dlogprobs"] = [share * slope for slope in columns[4]]
    return dict(answers=each, loss=loss)


def of_dpo(e):
    sides = ("chosen", "ref_chosen", "rejected", "ref_rejected")
    r = {side + "_logp": sum(e[side + "_logprobs"]) for side in sides}
    chosen = r["chosen_logp"] - r["ref_chosen_logp"]
    rejected = r["rejected_logp"] - r["ref_rejected_logp"]
    beta, eps, s = e["beta"], e["label_smoothing"], e["beta"] * (chosen - rejected)
    slope = beta * (-(1 - eps) * sigmoid(-s) + eps * sigmoid(s))
    loss = -(1 - eps) * log_sigmoid(s) - eps * log_sigmoid(-s)
    r.update(delta=chosen - rejected, loss=loss, dchosen=slope, drejected=-slope)
    return dict(r, reward_chosen=beta * chosen, reward_rejected=beta * rejected)


def objective(e, probabilities):
    """J from its definition: the expected reward minus beta KL."""
    kl = sum(p * math.log(p / q) for p, q in zip(probabilities, e["ref_probabilities"]) if p)
    return dot(probabilities, e["rewards"]) - e["beta"] * kl


def of_exact(e):
    weight = [p * math.exp(x / e["beta"]) for p, x in zip(e["ref_probabilities"], e["rewards"])]
    optimum = [w / sum(weight) for w in weight]
    at_ref, best = dot(e["ref_probabilities"], e["rewards"]), objective(e, optimum)
    return dict(Z=sum(weight), optimum=optimum, objective_ref=at_ref, objective_max=best)


# ---- The built-in example


def fields(names, *columns):
    return dict(zip(names.split(), columns))


OF_ANSWER = "score logprobs ref_logprobs values new_logprobs new_values"
CHOSEN = fields(
    OF_ANSWER, 1.0, [-0.79, -1.80, -0.05, -0.70], [-0.66, -2.30, -0.05, -1.20],
    [0.40, 0.30, 0.50, 0.50], [-0.69, -1.70, -0.04, -0.40], [0.45, 0.35, 0.60, 0.85],
)
REJECTED = fields(
    OF_ANSWER, -0.6, [-1.79, -0.60, -0.80, -0.50], [-1.86, -0.70, -0.70, -0.50],
    [0.40, -0.10, -0.20, -0.40], [-1.94, -0.65, -0.82, -0.50], [0.45, -0.15, -0.25, -0.50],
)
OF_SAMPLING = "logits ids repetition_penalty temperature top_k top_p u"
OF_REWARD = "chosen rejected margin center_rewards_coefficient"
OF_REINFORCE = "score logps ref_logps"
OF_PPO = "kl_coef gamma lam cliprange cliprange_value vf_coef answers"
OF_GRPO = (
    "beta epsilon epsilon_high use_bias_correction_kl loss_type scale_rewards"
    " max_completion_length answers"
)
OF_GROUP = "score logprobs ref_logprobs new_logprobs"
OF_DPO = (
    "beta label_smoothing chosen_logprobs ref_chosen_logprobs rejected_logprobs"
    " ref_rejected_logprobs"
)
OF_EXACT = "beta ref_probabilities rewards"
LOGITS, BOTH = [2.0, 1.0, 1.5, 0.5], [CHOSEN, REJECTED]
REWARDS = [[0.026, -0.1, 0.0, 0.9], [-0.014, -0.02, 0.02, -0.6]]
SUMMED = [fields(OF_REINFORCE, a["score"], a["logprobs"], a["ref_logprobs"]) for a in BOTH]
GROUP = [{name: a[name] for name in OF_GROUP.split()} for a in BOTH]
GROUP.append(fields(OF_GROUP, 0.5, [-1.3, -0.9], [-1.2, -1.0], [-1.24, -0.93]))
BUILT_IN = dict(
    softmax=dict(logits=LOGITS, temperature=1.0),
    sampling=fields(OF_SAMPLING, LOGITS, [2], 1.2, 0.7, 3, 0.9, 0.6),
    kl=dict(p_logits=LOGITS, q_logits=[2.0, 0.8, 1.3, 0.0]),
    reward=fields(OF_REWARD, 1.0, -0.6, 0.0, 0.0),
    reinforce=dict(baseline="rloo", beta=0.2, answers=SUMMED),
    gae=dict(
        gamma=1.0,
        lam=0.95,
        answers=[dict(rewards=r, values=a["values"]) for r, a in zip(REWARDS, BOTH)],
    ),
    ppo=fields(OF_PPO, 0.2, 1.0, 0.95, 0.2, 0.2, 0.1, BOTH),
    grpo=fields(OF_GRPO, 0.04, 0.2, 0.2, 0, "dapo", "group", 8, GROUP),
    dpo=fields(OF_DPO, 0.1, 0.0, *(a[k] for a in BOTH for k in ("logprobs", "ref_logprobs"))),
    exact=fields(OF_EXACT, 0.5, [0.2, 0.3, 0.5], [1.0, -0.6, 0.0]),
)
FORMULAS = {topic: globals()["of_" + topic] for topic in BUILT_IN}


def expected(topic, e):
    """Input and what is added, as one object; answers side by side."""
    more = FORMULAS[topic](e)
    r = dict(e, **more)
    if "answers" in e:
        r["answers"] = [dict(a, **b) for a, b in zip(e["answers"], more["answers"])]
    return r


# ---- Random examples; i: which of a topic's, so that each kind comes up


def uniform(low, high):
    return round(rng.uniform(low, high), 5)


def numbers(n, low, high):
    return [uniform(low, high) for _ in range(n)]


def near(x, far, most=math.inf):
    return [round(min(v + rng.uniform(-far, far), most), 5) for v in x]


def two_logprobs(n, far):
    """Of n tokens, and others near by."""
    x = numbers(n, -3, -0.01)
    return x, near(x, far, -1e-3)


def lengths(i):
    """Of two to five answers; every fourth example has answers of one token."""
    return [1 if i % 4 == 0 else rng.randint(1, 9) for _ in range(rng.randint(2, 5))]


def logits(i):
    """2 to 12 of them; in every third example there are ties."""
    x = numbers(rng.randint(2, 12), -4, 4)
    return [float(round(v)) for v in x] if i % 3 == 0 else x


def random_softmax(i):
    return dict(logits=logits(i), temperature=uniform(0.3, 3))


def random_sampling(i):
    x, penalty = logits(i), (1.0, 1.3, 0.8, 2.0)[i % 4]
    if i == 1:  # a nucleus that holds exactly p, of equal logits
        return fields(OF_SAMPLING, [0.0] * 4, [], 1.0, 0.7, 0, 0.5, 0.3)
    ids, temperature = [rng.randrange(len(x)) for _ in range(i % 6)], uniform(0.4, 2)
    k, p, u = (0, 1, 2, 3, 20)[i % 5], (1.0, 0.9, 0.6, 0.2)[i % 4], uniform(0, 0.99999)
    temperature, u = temperature if i % 5 else 1.0, u if i else 0.0
    return fields(OF_SAMPLING, x, ids, penalty, temperature, k, p, u)


def random_kl(i):
    p = logits(i)
    return dict(p_logits=p, q_logits=near(p, 1))


def random_reward(i):
    chosen, rejected = numbers(2, -3, 3)
    chosen *= 1 if i < 18 else 30  # sigmoids near 0 and 1
    return fields(OF_REWARD, chosen, rejected, uniform(0, 2) * (i % 2), uniform(0, 0.1) * (i & 2))


def random_reinforce(i):
    answers = [fields(OF_REINFORCE, uniform(-2, 2), *two_logprobs(n, 0.8)) for n in lengths(i)]
    if i % 5 == 1:
        for a in answers:
            a.update(logps=round(sum(a["logps"]), 5), ref_logps=uniform(-9, -1))
    if i == 6:
        answers = answers[:1]
    baseline = ("none", "mean", "rloo")[i % 3]
    return dict(baseline=baseline, beta=uniform(0, 0.5), answers=answers)


def random_gae(i):
    answers = [dict(rewards=numbers(n, -1, 1), values=numbers(n, -1, 1)) for n in lengths(i)]
    if i == 0:  # one token in all: nothing to divide by
        answers = [dict(rewards=[0.5], values=[0.2])]
    gamma, lam = ((1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5))[i % 5]
    return dict(gamma=gamma, lam=lam, answers=answers)


def random_ppo(i):
    answers = []
    for n in lengths(i):
        old, ref = two_logprobs(n, 0.8)
        values, new = numbers(n, -1, 1), near(old, 0.6, -1e-3) if i % 7 else list(old)
        answers.append(fields(OF_ANSWER, uniform(-2, 2), old, ref, values, new, near(values, 0.6)))
    e, clips = random_gae(1 + i), numbers(2, 0.05, 0.4)
    return fields(OF_PPO, uniform(0, 0.6), e["gamma"], e["lam"], *clips, uniform(0, 1), answers)


def random_grpo(i):
    answers = []
    for n in lengths(i) + lengths(i + 1)[:1]:
        old, ref = two_logprobs(n, 0.8)
        new = near(old, 0.6, -1e-3) if i % 7 else list(old)
        answers.append(fields(OF_GROUP, uniform(-2, 2), old, ref, new))
    words = ("grpo", "bnpo", "dr_grpo", "dapo")[i % 4], ("group", "batch", "none")[i % 3]
    numbers_of = uniform(0, 0.3) * (i % 5 != 1), uniform(0.05, 0.4), uniform(0.05, 0.4), i // 4 % 2
    return fields(OF_GRPO, *numbers_of, *words, rng.randint(4, 30), answers)


def random_dpo(i):
    chosen, rejected = (two_logprobs(n, 1) for n in lengths(i)[:2])
    return fields(OF_DPO, uniform(0.01, 1), uniform(0.01, 0.45) * (i % 2), *chosen, *rejected)


def random_exact(i):
    n = rng.randint(2, 9)
    p = [round(x, 6) for x in softmax(numbers(n, -2, 2))[1:]]
    return fields(OF_EXACT, uniform(0.1, 2), [round(1 - sum(p), 6)] + p, numbers(n, -2, 2))


RANDOM = {topic: globals()["random_" + topic] for topic in BUILT_IN}


# ---- Comparing


def disturbed(x, k, share=FLOAT, name=""):
    """Each number off by a share of itself, equal numbers equally; k: in which directions."""
    if isinstance(x, dict):
        return {key: disturbed(v, k, share, key) for key, v in x.items()}
    if isinstance(x, list):
        return [disturbed(v, k, share, name) for v in x]
    if not isinstance(x, float) or name in ("top_p", "u"):
        return x
    return x * (1 + share * random.Random("%r %d" % (x, k)).choice((-1, 1)))


def leaves(x, path=""):
    """(path, number or word) of everything inside."""
    if isinstance(x, (dict, list)):
        for key, v in x.items() if isinstance(x, dict) else enumerate(x):
            yield from leaves(v, "%s.%s" % (path, key) if path else str(key))
    else:
        yield path, x


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def tolerances(topic, e):
    """{path: how far a number may be off}, and does a clip, cut or draw turn around so near by?"""
    want = dict(leaves(expected(topic, e)))
    others = [dict(leaves(expected(topic, disturbed(e, k)))) for k in range(12)]
    at_edge = any(other.keys() != want.keys() for other in others)
    largest = max(abs(x) for k in ("logits", "p_logits", "q_logits") for x in e.get(k, []) + [0])
    allowed = {}
    for path, x in want.items() if not at_edge else ():
        if is_number(x) and all(is_number(other[path]) for other in others):
            moved = max(abs(other[path] - x) for other in others)
            kept = 1 if topic == "ppo" and path in ("policy_loss", "loss") else largest
            allowed[path] = 1e-6 * abs(x) + 2 * moved + FLOAT * kept + 1e-12
        if not isinstance(x, float):
            at_edge = at_edge or any(other[path] != x for other in others)
    return allowed, at_edge


def differences(topic, e, got):
    """What is wrong with the output for e."""
    for a in got.get("answers", []) if topic == "reinforce" else []:
        each = a.get("dlogps")  # a slope for the answer, or one for each of its tokens: the same
        if isinstance(each, list) and len(set(each)) == 1 and len(each) == len(a["logps"]):
            a["dlogps"] = each[0]
    want, found = dict(leaves(expected(topic, e))), dict(leaves(got))
    allowed = tolerances(topic, e)[0]
    for path in sorted(want.keys() - found.keys()):
        yield "`%s` is missing" % path
    for path in sorted(found.keys() - want.keys()):
        if not re.search(r"(^|\.)(prompt|[a-z_]*tokens\.\d+)$", path):
            yield "`%s` is not in the contract" % path
    for path in want.keys() & found.keys():
        x, y = want[path], found[path]
        if path in allowed and is_number(y):
            if not abs(y - x) <= allowed[path]:
                yield "`%s` is %.9g, not %.9g (+- %.1e)" % (path, y, x, allowed[path])
        elif x != y or isinstance(x, bool) != isinstance(y, bool):
            yield "`%s` is %r, not %r" % (path, y, x)


# ---- Running align

passed = failed = 0


def check(what, faults):
    """Counts one check; `faults`: what is wrong, none if it holds."""
    global passed, failed
    faults = list(faults)
    passed, failed = passed + (not faults), failed + bool(faults)
    for fault in faults[:3]:
        print("FAIL  %s: %s" % (what, fault))


def explain(*arguments, example=None):
    """Exit status, output, messages; the example goes through a file."""
    command = [run.align, "explain", *arguments]
    if example is not None:
        with open(run.file, "w", encoding="utf-8") as f:
            f.write(example if isinstance(example, str) else json.dumps(example))
        command += ["--example", run.file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8", "replace")


def compare(what, topic, e, *given):
    """One check: the output for what is given (default: e) is e's; as input it gives itself."""
    status, out, said = explain(topic, "--json", example=given[0] if given else e)
    if status or said:
        faults = ["exit %d, %r for %s" % (status, said.strip(), json.dumps(e)[:300])]
    else:
        faults = list(differences(topic, e, json.loads(out)))
        if explain(topic, "--json", example=out)[1] != out:
            faults.append("as input its output gives another output")
    check("%s, %s" % (topic, what), faults)


def refused(what, topic, e, field):
    """One check: exit 1, no output, one line on stderr that has the field's name in it."""
    status, out, said = explain(topic, "--json", example=e)
    right = status == 1 and not out and said.count("\n") == 1
    right = right and re.search(r"(?<![a-z_])%s(?![a-z_])" % field, said)
    fault = "not refused by a line that names `%s`: exit %d, %r, %r" % (field, status, out, said)
    check("%s, %s" % (topic, what), [] if right else [fault[:400]])


# ---- The formulas against libraries and differences


def golden(name, source):
    """Numbers of golden_explain_NAME in test_align.c."""
    text = re.search(r"golden_explain_%s(\[\d+\])? = ([^;]*);" % name, source).group(2)
    text = text.replace("-INFINITY", "null").replace("{", "[").replace("}", "]")
    return [x for _path, x in leaves(json.loads(text))]


PPO = "raw_advantages returns advantages kl rewards ratios clipped token_losses dlogprobs"
GOLDEN = (  # topic, begin of the array's name, fields with an array each, what is not built in
    ("softmax", "", "log_sum_exp entropy probabilities:softmax", {}),
    ("sampling", "", "penalized scaled after_top_k:top_k after_top_p:top_p", {}),
    ("sampling", "", "probabilities:drawn", {}),
    ("sampling", "", "after_top_p:tied", dict(logits=[0.0] * 4, ids=[], top_k=0, top_p=0.5)),
    ("kl", "", "kl k1 k3 mean_k3", {}),
    ("exact", "", "Z optimum objective_ref objective_max", {}),
    ("reinforce", "reinforce_", "reward advantage loss dlogps", {}),
    ("gae", "ppo_", "raw_advantages returns advantages", {}),
    ("ppo", "ppo_", PPO + " value_losses dvalues policy_loss,value_loss,loss:loss", {}),
    ("reward", "", "probability,loss,dchosen,drejected:reward", {}),
    ("reward", "", "probability,loss,dchosen,drejected:reward_margin",
     dict(margin=0.5, center_rewards_coefficient=0.01)),
    ("dpo", "", "loss,dchosen,drejected,reward_chosen,reward_rejected:dpo", {}),
    ("dpo", "", "loss,dchosen,drejected,reward_chosen,reward_rejected:dpo_smoothed",
     dict(label_smoothing=0.1)),
)


def against_libraries():
    with open(os.path.join(ROOT, "test_align.c"), encoding="utf-8") as file:
        source = file.read()
    for topic, begin, names, changes in GOLDEN:
        r = expected(topic, dict(BUILT_IN[topic], **changes))
        for name in names.split():
            array, parts = begin + name.split(":")[-1], name.split(":")[0].split(",")
            parts = [[r[p]] if p in r else [a[p] for a in r["answers"]] for p in parts]
            mine, theirs = [x for _path, x in leaves(parts)], golden(array, source)
            # 1e-7: TRL's whitening divides 8 by 7 in float
            same = len(mine) == len(theirs) and all(
                a is b or (None not in (a, b) and abs(a - b) <= 1e-7 * max(1, abs(b)))
                for a, b in zip(mine, theirs)
            )
            check("golden_explain_" + array, [] if same else ["here %s, there %s" % (mine, theirs)])


def against_differences(topic, e):
    """Slopes of the formulas, and exact's optimum, where all slopes are 0: wrong ones, as text."""

    def wrong(name, slope, loss, holder, key):
        """loss() depends on holder[key]."""
        here, h, sides = holder[key], 1e-5, []
        for sign in (1, -1):
            holder[key] = here + sign * h
            sides.append(loss())
        holder[key] = here
        if abs(slope - (sides[0] - sides[1]) / (2 * h)) > 1e-7:
            yield "%s is %g, by differences %g" % (name, slope, (sides[0] - sides[1]) / (2 * h))

    r, e = FORMULAS[topic](e), copy.deepcopy(e)
    if topic == "reward":
        for side in ("chosen", "rejected"):
            yield from wrong(side, r["d" + side], lambda: of_reward(e)["loss"], e, side)
    if topic == "dpo":
        for side in ("chosen", "rejected"):
            x = e[side + "_logprobs"]
            yield from wrong(side, r["d" + side], lambda: of_dpo(e)["loss"], x, -1)
    if topic == "reinforce":
        A = [a["advantage"] for a in r["answers"]]
        for a, was in zip(e["answers"], r["answers"]):
            x, key = (a["logps"], 0) if isinstance(a["logps"], list) else (a, "logps")
            yield from wrong("dlogps", was["dlogps"], lambda: of_reinforce(e, A)["loss"], x, key)
    if topic == "ppo":
        for a, was in zip(e["answers"], r["answers"]):
            for name in ("logprobs", "values"):
                for t, slope in enumerate(was["d" + name]):
                    x, loss = a["new_" + name], lambda: of_ppo(e)["loss"]
                    yield from wrong("d%s %d" % (name, t), slope, loss, x, t)
    if topic == "grpo":
        A = [a["advantage"] for a in r["answers"]]
        for a, was in zip(e["answers"], r["answers"]):
            for t, slope in enumerate(was["dlogprobs"]):
                loss = lambda: of_grpo(e, A)["loss"]  # noqa: E731
                yield from wrong("dlogprob %d" % t, slope, loss, a["new_logprobs"], t)
    if topic == "exact":
        x = [math.log(p) for p in r["optimum"]]
        for i in range(len(x)):
            yield from wrong("dJ %d" % i, 0, lambda: objective(e, softmax(x)), x, i)


# ---- The checks


def sides_of_clips(e):
    """On which the example has a token, and whether the clip stopped its gradient."""
    for a in expected("ppo", e)["answers"]:
        for ratio, A, cut in zip(a["ratios"], a["advantages"], a["clipped"]):
            yield (ratio > 1 + e["cliprange"]) - (ratio < 1 - e["cliprange"]), A > 0, cut
        for old, new, slope in zip(a["values"], a["new_values"], a["dvalues"]):
            yield "value", new > old, abs(new - old) > e["cliprange_value"], slope == 0


def check_numbers(topic):
    compare("built in", topic, BUILT_IN[topic], None)
    compare("an empty file", topic, BUILT_IN[topic], {})
    seen = set()
    for i in range(EXAMPLES):
        e = RANDOM[topic](i)
        while tolerances(topic, e)[1]:
            e = RANDOM[topic](i)
        check("%s, slopes of random example %d" % (topic, i), against_differences(topic, e))
        compare("random example %d" % i, topic, e)
        if topic == "ppo":
            seen.update(sides_of_clips(e))
    if topic == "ppo":
        all_sides = {(side, up, side == (1 if up else -1)) for side in (-1, 0, 1) for up in (0, 1)}
        all_sides |= {("value", up, far, far and cut) for up in (0, 1) for far in (0, 1)
                      for cut in (0, 1)}
        check("ppo, every side of the clips", map(str, all_sides ^ seen))


def check_defaults(topic):
    """What is left out keeps its built-in value: each setting in turn, each list in turn."""
    built_in = BUILT_IN[topic]
    others = dict(ids=[0, 3, 3], ref_probabilities=[0.25, 0.25, 0.5])
    for name, value in built_in.items():
        e = RANDOM[topic](8)
        if isinstance(value, list):
            changed = {name: others.get(name, disturbed(value, 1, 0.25))}
            compare("only " + name, topic, dict(built_in, **changed), changed)
        elif not tolerances(topic, dict(e, **{name: value}))[1]:
            given = {key: x for key, x in e.items() if key != name}
            compare("without " + name, topic, dict(e, **{name: value}), given)
    for name in built_in["answers"][0] if "answers" in built_in else ():
        answers = [{k: x for k, x in a.items() if k != name} for a in built_in["answers"]]
        compare("answers without " + name, topic, built_in, dict(built_in, answers=answers))


def check_lengths(topic):
    """A list of numbers that must be as long as others is too short, too long, empty."""
    inside = BUILT_IN[topic].get("answers")
    for name, x in (inside[1] if inside else BUILT_IN[topic]).items():
        if isinstance(x, list) and name not in ("logits", "ids"):
            for wrong in (x[:-1], x + [-0.5], []):
                e = copy.deepcopy(BUILT_IN[topic])
                (e["answers"][1] if inside else e)[name] = wrong
                refused("%s of %d numbers" % (name, len(wrong)), topic, e, name)


BROKEN = dict(
    softmax=(
        (dict(temperature=0), "temperature"),
        (dict(temperature="warm"), "temperature"),
        (dict(logits=[]), "logits"),
        (dict(logits=[1, "two"]), "logits"),
        (dict(logits=3), "logits"),
    ),
    sampling=(
        (dict(ids=[4]), "ids"),
        (dict(ids=[-1]), "ids"),
        (dict(ids=[0.5]), "ids"),
        (dict(u=1), "u"),
        (dict(u=-0.1), "u"),
        (dict(temperature=0), "temperature"),
        (dict(repetition_penalty=0), "repetition_penalty"),
        (dict(top_k=-1), "top_k"),
        (dict(top_p=1.5), "top_p"),
        (dict(tokens=[" a", " far"]), "tokens"),
    ),
    kl=((dict(p_logits=[1.0, 2.0, 3.0]), "[pq]_logits"),),
    reinforce=(
        (dict(baseline="median"), "baseline"),
        (dict(answers=[]), "answers"),
        (dict(answers=7), "answers"),
        (dict(answers=[dict(score=1, logps=[-1.0], ref_logps=[-2.0])]), "baseline"),
        (dict(answers=[dict(score="good")]), "score"),
    ),
    gae=((dict(gamma=[1]), "gamma"), (dict(answers=[dict(rewards=[], values=[])]), "rewards")),
    ppo=((dict(answers=[]), "answers"), (dict(answers=[1, 2]), "answers")),
    grpo=(
        (dict(answers=[]), "answers"),
        (dict(answers=[dict(score=1)]), "answers"),
        (dict(loss_type="ppo"), "loss_type"),
        (dict(scale_rewards=1), "scale_rewards"),
        (dict(epsilon=-0.1), "epsilon"),
        (dict(max_completion_length=0), "max_completion_length"),
        (dict(use_bias_correction_kl=2), "use_bias_correction_kl"),
    ),
    dpo=((dict(chosen_logprobs=[], ref_chosen_logprobs=[]), "chosen_logprobs"),),
    exact=((dict(beta=0), "beta"), (dict(ref_probabilities=[0.5, -0.5, 1]), "ref_probabilities")),
)


def check_text(topic, language):
    faults = []
    for e in [None, BUILT_IN[topic]] + [RANDOM[topic](i) for i in range(1, 5)]:
        status, out, said = explain(topic, "--language", language, example=e)
        if status or said or out.count("\n") < 3:
            faults.append("exit %d, %d characters, %r" % (status, len(out), said))
        wide = [line for line in out.split("\n") if len(line) > COLUMNS or "\t" in line]
        faults += ["%d columns: %s" % (len(line), line) for line in wide]
    check("%s, text, %s" % (topic, language), faults)


def check_list(language):
    status, out, _said = explain("--language", language)
    first = [line.split()[0].strip("`") for line in out.split("\n") if line.strip()]
    listed = [topic for topic in first if topic in BUILT_IN]
    faults = ["exit %d" % status] * (status != 0)
    if listed != list(BUILT_IN):
        faults.append("not every topic once, in the course's order: %s" % first)
    # Its last line names the program as it was called: with its whole path, here.
    shown = out.replace(run.align, "./align")
    faults += ["%d columns" % len(line) for line in shown.split("\n") if len(line) > COLUMNS]
    check("no topic, " + language, faults)


def run(align):
    if not os.path.exists(align):
        sys.exit("%s: is not there; run make first" % align)
    with tempfile.TemporaryDirectory() as work:
        run.align, run.file = align, os.path.join(work, "example.json")
        against_libraries()
        for topic in BUILT_IN:
            before = passed, failed
            check_numbers(topic)
            check_defaults(topic)
            check_lengths(topic)
            for language in ("en", "pt"):
                check_text(topic, language)
            for change, field in BROKEN.get(topic, ()):
                refused(json.dumps(change), topic, change, field)
            print("%-9s  %3d passed, %d failed" % (topic, passed - before[0], failed - before[1]))
        for language in ("en", "pt"):
            check_list(language)
    print("%d passed, %d failed" % (passed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    run(os.path.realpath(sys.argv[1]) if len(sys.argv) > 1 else os.path.join(ROOT, "align"))
