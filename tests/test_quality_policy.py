"""GRPO on addition: rewards and gradients as published, sums held out, a cache to be trusted."""

import functools
import itertools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.quality import addition, policy
from benchmarks.quality.addition import ANSWER, HELD, PROMPT, TAUGHT
from benchmarks.quality.arms import Arm
from benchmarks.quality.policy import BETA, EPSILON, GROUP, PROMPTS, Policy
from benchmarks.quality.training import train

LAYERS = 2
ANSWERS = np.array([*itertools.product(range(addition.VOCABULARY), repeat=ANSWER)])


def pretrained_in(directory, patch):
    """A small one, whose decoder is pretrained while something else is traced."""
    patch.setattr(tempfile, "tempdir", str(directory))
    small = Policy(LAYERS, steps=200)
    jax.eval_shape(small.init, jax.random.key(50))
    return small


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """One that has begun to be pretrained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(addition, "LONGEST", 50)
        return pretrained_in(tmp_path_factory.mktemp("cache"), patch)


@pytest.fixture(scope="module")
def score(task):
    """Log-probabilities of the digits of answers."""
    return jax.jit(functools.partial(addition.log_probabilities, task.model))


class Recorded:
    """A function that keeps what it is called with, and what it gives."""

    def __init__(self, function):
        self.function, self.arguments, self.results = function, [], []

    def __call__(self, *arguments):
        self.arguments.append(arguments)
        self.results.append(self.function(*arguments))
        return self.results[-1]


def test_rewards_of_answers_made_by_hand():
    right = np.array([[3, 7, 10, 4, 5, 11, 2, 8, 0]])  # 37 + 45 = 82
    answers = np.array([[2, 8, 0], [2, 8, 1], [1, 8, 1], [1, 1, 1], [10, 11, 0]])
    answered = np.hstack([right[:, :PROMPT].repeat(len(answers), 0), answers])
    rewards, exact = policy.reward(jnp.asarray(answered), jnp.asarray(right))
    np.testing.assert_array_equal(rewards, [1, 2 / 8, 1 / 8, 0, 1 / 8])
    np.testing.assert_array_equal(exact, [True, False, False, False, False])


def test_all_sums_are_right_and_none_is_twice():
    sums = np.concatenate([HELD, TAUGHT])
    places = np.array([1, 10, 100])
    first, second, total = sums[:, 1::-1], sums[:, 4:2:-1], sums[:, PROMPT:]
    np.testing.assert_array_equal((first + second) @ places[:2], total @ places)
    assert len(np.unique(sums, axis=0)) == 10_000


def test_held_out_prompts_are_never_learnt_from(task, monkeypatch):
    monkeypatch.setattr(task, "answered", recorded := Recorded(lambda params, sums, key: sums))

    def prompts(draw):
        def drawn(key):
            draw(task.reference, key)
            return recorded.arguments.pop()[1]

        sums = jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(50), 200))
        return {*map(tuple, sums.reshape(-1, PROMPT + ANSWER).tolist())}

    held = {*map(tuple, HELD.tolist())}
    learnt = prompts(task.loss)
    assert len(learnt) > 1000
    assert not learnt & held
    halves = [
        prompts(lambda params, key, part=part: task.evaluate(params, key, part)) for part in (0, 1)
    ]
    assert halves[0] | halves[1] == held
    assert len(halves[0]) == len(halves[1]) == len(held) / 2


def test_pretraining_learns_from_the_same_sums(task, monkeypatch):
    def taught(*_):
        raise RuntimeError("drawn")

    monkeypatch.setattr(addition, "taught", taught)
    with pytest.raises(RuntimeError, match="drawn"):
        jax.eval_shape(lambda: addition._teach(task.model))


def test_advantages_of_a_group_sum_to_0():
    rewards = np.random.default_rng(50).integers(9, size=(PROMPTS, GROUP)) / 8
    found = policy.advantages(jnp.asarray(rewards, jnp.float32))
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-5)
    np.testing.assert_allclose((found**2).mean(1), 1, rtol=1e-2)
    np.testing.assert_array_equal(policy.advantages(jnp.full((1, GROUP), 0.125)), 0)


def test_answers_follow_the_policy(task, score):
    draws = 20_000
    prompt = jnp.asarray(HELD[:1])
    sure = jax.tree.map(lambda leaf: 3 * leaf, task.reference)  # of some answers
    answered = jax.jit(task.answered)(sure, jnp.repeat(prompt, draws, 0), jax.random.key(50))
    np.testing.assert_array_equal(answered[:, :PROMPT], prompt[:, :PROMPT].repeat(draws, 0))
    every = jnp.hstack([prompt[:, :PROMPT].repeat(len(ANSWERS), 0), ANSWERS])
    probabilities = jnp.exp(score(sure, every).sum(1))
    assert probabilities.max() > 0.1
    places = addition.VOCABULARY ** np.arange(ANSWER)[::-1]
    frequencies = np.bincount(answered[:, PROMPT:] @ places, minlength=len(ANSWERS)) / draws
    np.testing.assert_allclose(frequencies, probabilities, atol=0.015)


def test_gradient_is_that_of_reinforce_with_these_advantages(task, monkeypatch):
    monkeypatch.setattr(task, "answered", recorded := Recorded(task.answered))
    params = jax.tree.map(lambda leaf: 1.1 * leaf, task.reference)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params):
        loss = task.loss(params, jax.random.key(52))
        return loss, (recorded.arguments.pop()[1], recorded.results.pop())

    found, (sums, answered) = jax.device_get(gradients(params))
    groups = sums.reshape(PROMPTS, GROUP, -1)
    np.testing.assert_array_equal(groups, groups[:, :1].repeat(GROUP, 1))
    right = sums[:, PROMPT:] == answered[:, PROMPT:]
    rewards = (5 * right.all(1) + right.sum(1)).reshape(PROMPTS, GROUP) / 8
    deviation = rewards - rewards.mean(1, keepdims=True)
    advantage = deviation / (rewards.std(1, keepdims=True) + EPSILON)
    assert advantage.std() > 0.5

    @jax.jit
    def by_hand(params):
        own, pullback = jax.vjp(log_probabilities, params)
        ratio = jnp.exp(log_probabilities(task.reference) - own)
        return pullback((BETA * (1 - ratio) - advantage.reshape(-1, 1)) / own.size)[0]

    def log_probabilities(params):
        logits, _ = task.model.apply(params, answered[:, :-1])
        every = jax.nn.log_softmax(logits[:, PROMPT - 1 :])
        return jnp.take_along_axis(every, answered[:, PROMPT:, None], 2)[..., 0]

    for one, wanted in zip(*map(jax.tree.leaves, (found, by_hand(params))), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-3, atol=1e-6)


def test_groups_with_equal_rewards_give_no_gradient():
    advantage = policy.advantages(jnp.full((PROMPTS, GROUP), 0.125)).reshape(-1, 1)
    own = jnp.full((PROMPTS * GROUP, ANSWER), -1.5)
    assert not jax.grad(policy.surrogate)(own, advantage).any()


def test_divergence_is_unbiased_and_0_at_the_reference():
    own, reference = jax.nn.log_softmax(jax.random.normal(jax.random.key(50), (2, 12)))
    estimates = jax.vmap(policy.divergence)(own, reference)
    np.testing.assert_allclose(
        (jnp.exp(own) * estimates).sum(), (jnp.exp(own) * (own - reference)).sum(), rtol=1e-5
    )
    value, gradient = jax.value_and_grad(policy.divergence)(own, own)
    assert value == 0
    assert not gradient.any()


@pytest.mark.slow
def test_pretraining_leaves_room_to_learn_and_learning_uses_it(tmp_path, monkeypatch, score):
    task = pretrained_in(tmp_path, monkeypatch)
    before = jnp.exp(score(task.reference, HELD).sum(1)).mean()
    assert 0.2 < before < 0.45
    curves, _ = train(task, Arm("adamw"), 1.0, 50)
    assert curves["exact"][-1] > before + 0.06
    np.testing.assert_allclose(curves["loss"], 1 - curves["reward"], rtol=1e-6)


def test_states_and_depth_are_those_of_the_layers(task):
    states = jax.eval_shape(task.states, task.reference, jax.random.key(50))
    assert states.shape == (LAYERS + 1, PROMPTS, PROMPT + ANSWER - 1, 32)
    assert [*task.depth.groups.values()] == [LAYERS]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty one, with pretraining that is told by its count."""
    taught = itertools.count(1.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(addition, "_teach", lambda model: {"kernel": np.full(99, next(taught))})

    def pretrained(layers=LAYERS):
        return Policy(layers).reference["kernel"][0]

    return tmp_path / "depthsmooth-quality", pretrained


def test_pretraining_is_done_once_for_each_number_of_layers(cache):
    directory, pretrained = cache
    assert [pretrained(), pretrained(), pretrained(3), pretrained()] == [1, 1, 2, 1]
    assert len(list(directory.iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "short", "changed", "foreign"])
def test_a_damaged_or_foreign_file_is_made_anew(cache, damage):
    directory, pretrained = cache
    pretrained()
    [path] = directory.iterdir()
    content = path.read_bytes()
    pretrained(3)
    [other] = {*directory.iterdir()} - {path}
    path.write_bytes(
        {
            "empty": b"",
            "short": content[:-1],
            "changed": content[:-1] + bytes([content[-1] ^ 1]),
            "foreign": other.read_bytes(),
        }[damage]
    )
    assert [pretrained(), pretrained()] == [3, 3]


def test_nothing_half_written_is_left(cache, monkeypatch):
    directory, pretrained = cache

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            pretrained()
    assert not list(directory.iterdir())
    assert pretrained() == 2
