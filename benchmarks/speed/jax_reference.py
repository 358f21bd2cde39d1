"""The same updates in JAX, written for this benchmark as the reference line: jitted as a whole.

Networks as ours: stacked ensembles (10 critics have LayerNorm before every ReLU), a tanh-Gaussian
actor, Adam, Polyak averaging. The batch comes out of arrays on the device with one gather, inside
the jit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from worker import BATCH, HIDDEN, ROWS, Shape

Tree = Any
DISCOUNT, TAU, LEARNING_RATE, ACTIONS, ALPHA = 0.99, 5e-3, 3e-4, 10, 5.0
ADAM = optax.adam(LEARNING_RATE)


def stack(key: jax.Array, members: int, sizes: tuple[int, ...]) -> Tree:
    """E networks: [(weight [E, in, out], bias [E, 1, out]), ...]."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        key, one, two = jax.random.split(key, 3)
        bound = 1.0 / math.sqrt(inputs)
        layers.append(
            (
                jax.random.uniform(one, (members, inputs, outputs), minval=-bound, maxval=bound),
                jax.random.uniform(two, (members, 1, outputs), minval=-bound, maxval=bound),
            )
        )
    return layers


def forward(layers: Tree, x: jax.Array, *, norm: bool = False) -> jax.Array:
    """[B, in] -> [E, B, out]."""
    x = jnp.broadcast_to(x, (layers[0][0].shape[0], *x.shape))
    for k, (weight, bias) in enumerate(layers):
        x = x @ weight + bias
        if k < len(layers) - 1:
            if norm:
                centred = x - x.mean(-1, keepdims=True)
                x = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
            x = jax.nn.relu(x)
    return x


def q_of(
    critics: Tree, observations: jax.Array, actions: jax.Array, *, norm: bool = False
) -> jax.Array:
    """[B, O], [B, A] -> [E, B]."""
    return forward(critics, jnp.concatenate([observations, actions], -1), norm=norm)[..., 0]


def sample(actor: Tree, observations: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Actions [..., B, A] of a tanh-Gaussian and their log density [..., B]."""
    mean, raw = jnp.split(forward(actor, observations)[0], 2, -1)
    log_std = -5.0 + 3.5 * (jnp.tanh(raw) + 1.0)
    pre_tanh = mean + jnp.exp(log_std) * noise
    density = -0.5 * noise**2 - log_std - 0.5 * math.log(2.0 * math.pi)
    jacobian = 2.0 * (math.log(2.0) - pre_tanh - jax.nn.softplus(-2.0 * pre_tanh))
    return jnp.tanh(pre_tanh), (density - jacobian).sum(-1)


def descend(
    loss: Callable[[Tree], jax.Array], parameters: Tree, moments: Tree
) -> tuple[Tree, Tree]:
    """One step of Adam."""
    updates, moments = ADAM.update(jax.grad(loss)(parameters), moments)
    return optax.apply_updates(parameters, updates), moments


def polyak(target: Tree, online: Tree) -> Tree:
    """``target += tau (online - target)``."""
    return jax.tree.map(lambda t, o: t + TAU * (o - t), target, online)


class Columns:
    """Offsets of the fields in a stored row."""

    def __init__(self, shape: Shape) -> None:
        o, a = shape
        self.observations, self.actions = slice(0, o), slice(o, o + a)
        self.next_observations, self.reward = slice(o + a, 2 * o + a), 2 * o + a
        self.width = 2 * o + a + 1


def prepare(shape: Shape, critics: int) -> tuple[Columns, jax.Array, Tree]:
    """(columns, rows [N, D], parameters and moments of everything)."""
    o, a = shape
    columns, keys = Columns(shape), jax.random.split(jax.random.key(0), 6)
    rows = jax.random.normal(keys[0], (ROWS, columns.width))
    rows = rows.at[:, columns.actions].set(jnp.clip(rows[:, columns.actions], -1.0, 1.0))
    critic = stack(keys[1], critics, (o + a, HIDDEN, HIDDEN, 1))
    actor = stack(keys[2], 1, (o, HIDDEN, HIDDEN, 2 * a))
    value = stack(keys[3], 1, (o, HIDDEN, HIDDEN, 1))
    temperature = jnp.zeros(())
    state = {
        "critic": critic,
        "target": jax.tree.map(jnp.copy, critic),
        "actor": actor,
        "value": value,
        "temperature": temperature,
        "moments": {
            "critic": ADAM.init(critic),
            "actor": ADAM.init(actor),
            "value": ADAM.init(value),
            "temperature": ADAM.init(temperature),
        },
        "key": keys[4],
    }
    return columns, rows, state


def repeat(
    step: Callable[[Tree, jax.Array], Tree], rows: jax.Array, state: Tree, per_call: int
) -> Callable[[int], None]:
    """n updates, ``per_call`` in each call of the jitted step; waits for the last."""
    jitted = jax.jit(step, donate_argnums=0)
    box = [state]

    def run(n: int) -> None:
        for _ in range(max(1, n // per_call)):
            box[0] = jitted(box[0], rows)
        jax.block_until_ready(box[0])

    return run


def sac(critics: int, utd: int) -> Callable[[Shape], Callable[[int], None]]:
    """RLPD: ``utd`` critic updates in a scan, then actor and temperature."""

    def build(shape: Shape) -> Callable[[int], None]:
        columns, rows, state = prepare(shape, critics)
        norm = critics > 2  # RLPD's; SAC has none
        batch_shape = (BATCH, shape.action)

        def update_critic(state: Tree, batch: jax.Array, key: jax.Array) -> Tree:
            one, two = jax.random.split(key)
            following = batch[:, columns.next_observations]
            action, _ = sample(state["actor"], following, jax.random.normal(one, batch_shape))
            members = jax.random.permutation(two, critics)[:2]
            drawn = jax.tree.map(lambda x: x[members], state["target"])
            next_value = q_of(drawn, following, action, norm=norm).min(0)
            target = batch[:, columns.reward] + DISCOUNT * next_value

            def loss(critic: Tree) -> jax.Array:
                at = batch[:, columns.observations], batch[:, columns.actions]
                q = q_of(critic, *at, norm=norm)
                return jnp.square(q - target).mean(-1).sum()

            critic, moments = descend(loss, state["critic"], state["moments"]["critic"])
            return state | {
                "critic": critic,
                "target": polyak(state["target"], critic),
                "moments": state["moments"] | {"critic": moments},
            }

        def step(state: Tree, rows: jax.Array) -> Tree:
            key, draw, noise, *keys = jax.random.split(state["key"], 3 + utd)
            batches = rows[jax.random.randint(draw, (utd * BATCH,), 0, ROWS)]
            batches = batches.reshape(utd, BATCH, -1)
            state, _ = jax.lax.scan(
                lambda s, x: (update_critic(s, *x), None), state, (batches, jnp.stack(keys))
            )
            observations = batches[-1][:, columns.observations]
            noise = jax.random.normal(noise, batch_shape)

            def actor_loss(actor: Tree) -> tuple[jax.Array, jax.Array]:
                action, log_prob = sample(actor, observations, noise)
                q = q_of(state["critic"], observations, action, norm=norm).mean(0)
                scale = jax.lax.stop_gradient(jnp.abs(q).mean())
                return (jnp.exp(state["temperature"]) * log_prob - q / scale).mean(), log_prob

            gradient, log_prob = jax.grad(actor_loss, has_aux=True)(state["actor"])
            moments = state["moments"]
            updates, actor_moments = ADAM.update(gradient, moments["actor"])
            entropy_gap = (log_prob - 0.5 * shape.action).mean()
            temperature, temperature_moments = descend(
                lambda t: -jnp.exp(t) * entropy_gap, state["temperature"], moments["temperature"]
            )
            return state | {
                "actor": optax.apply_updates(state["actor"], updates),
                "temperature": temperature,
                "moments": moments | {"actor": actor_moments, "temperature": temperature_moments},
                "key": key,
            }

        return repeat(step, rows, state, utd)

    return build


def iql(shape: Shape) -> Callable[[int], None]:
    """Value by expectile, two critics, actor by advantage-weighted regression."""
    columns, rows, state = prepare(shape, 2)

    def step(state: Tree, rows: jax.Array) -> Tree:
        key, draw = jax.random.split(state["key"])
        batch = rows[jax.random.randint(draw, (BATCH,), 0, ROWS)]
        observations, actions = batch[:, columns.observations], batch[:, columns.actions]
        moments = state["moments"]
        target_q = q_of(state["target"], observations, actions).min(0)

        def value_loss(value: Tree) -> jax.Array:
            gap = target_q - forward(value, observations)[0, :, 0]
            return (jnp.where(gap < 0.0, 0.3, 0.7) * gap**2).mean()

        value, value_moments = descend(value_loss, state["value"], moments["value"])
        advantage = target_q - forward(value, observations)[0, :, 0]
        next_value = forward(value, batch[:, columns.next_observations])[0, :, 0]
        target = batch[:, columns.reward] + DISCOUNT * next_value

        def critic_loss(critic: Tree) -> jax.Array:
            return jnp.square(q_of(critic, observations, actions) - target).mean(-1).sum()

        critic, critic_moments = descend(critic_loss, state["critic"], moments["critic"])
        weight = jnp.minimum(jnp.exp(3.0 * advantage), 100.0)
        pre_tanh = jnp.arctanh(jnp.clip(actions, -0.999, 0.999))

        def actor_loss(actor: Tree) -> jax.Array:
            mean, raw = jnp.split(forward(actor, observations)[0], 2, -1)
            log_std = -5.0 + 3.5 * (jnp.tanh(raw) + 1.0)
            scaled = (pre_tanh - mean) / jnp.exp(log_std)
            return (weight * (0.5 * scaled**2 + log_std).sum(-1)).mean()

        actor, actor_moments = descend(actor_loss, state["actor"], moments["actor"])
        return state | {
            "value": value,
            "critic": critic,
            "actor": actor,
            "target": polyak(state["target"], critic),
            "moments": moments
            | {"value": value_moments, "critic": critic_moments, "actor": actor_moments},
            "key": key,
        }

    return repeat(step, rows, state, 1)


def cql(shape: Shape) -> Callable[[int], None]:
    """Two critics with CQL(H), 3 x 10 actions, and the SAC actor."""
    columns, rows, state = prepare(shape, 2)
    many = (ACTIONS, BATCH, shape.action)

    def step(state: Tree, rows: jax.Array) -> Tree:
        key, draw, *keys = jax.random.split(state["key"], 7)
        batch = rows[jax.random.randint(draw, (BATCH,), 0, ROWS)]
        observations, actions = batch[:, columns.observations], batch[:, columns.actions]
        following, actor = batch[:, columns.next_observations], state["actor"]
        next_action, _ = sample(actor, following, jax.random.normal(keys[0], many[1:]))
        next_value = q_of(state["target"], following, next_action).min(0)
        target = batch[:, columns.reward] + DISCOUNT * next_value
        here, log_here = sample(actor, observations, jax.random.normal(keys[1], many))
        there, log_there = sample(actor, following, jax.random.normal(keys[2], many))
        uniform = jax.random.uniform(keys[3], many, minval=-1.0, maxval=1.0)
        log_uniform = jnp.full((ACTIONS, BATCH), -shape.action * math.log(2.0))
        tried = jnp.concatenate([actions[None], here, there, uniform]).reshape(-1, shape.action)
        densities = jnp.concatenate([log_here, log_there, log_uniform])
        repeated = jnp.tile(observations, (3 * ACTIONS + 1, 1))

        def critic_loss(critic: Tree) -> jax.Array:
            q = q_of(critic, repeated, tried).reshape(2, -1, BATCH)
            logged, sampled = q[:, 0], q[:, 1:]
            integral = jax.nn.logsumexp(sampled - densities, axis=1) - math.log(3 * ACTIONS)
            return (jnp.square(logged - target) + ALPHA * (integral - logged)).mean(-1).sum()

        moments = state["moments"]
        critic, critic_moments = descend(critic_loss, state["critic"], moments["critic"])
        noise = jax.random.normal(keys[4], many[1:])

        def actor_loss(actor: Tree) -> jax.Array:
            action, log_prob = sample(actor, observations, noise)
            return (0.1 * log_prob - q_of(critic, observations, action).min(0)).mean()

        actor, actor_moments = descend(actor_loss, actor, moments["actor"])
        return state | {
            "critic": critic,
            "actor": actor,
            "target": polyak(state["target"], critic),
            "moments": moments | {"critic": critic_moments, "actor": actor_moments},
            "key": key,
        }

    return repeat(step, rows, state, 1)


CASES = {
    "sac 2 critics": sac(2, 1),
    "sac 10 critics": sac(10, 1),
    "sac 10 critics utd 20": sac(10, 20),
    "iql": iql,
    "cql": cql,
}
