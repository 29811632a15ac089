"""Training examples on the devices, and the batch of a step: a pure function of the step's number.

Every random draw comes from `fold_in(key, step)` and then per example, never from carried state or from the number of
devices: a resumed run repeats the uninterrupted one bit for bit, and four photos train on one chip or on 256.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt

from dreambooth_jax.diffusion.loss import Batch
from dreambooth_jax.diffusion.process import Process

Augment = Callable[[PyTree, Key[Array, ""]], PyTree]
Number = float | Float[Array, ""]
# Up to this number of examples an epoch's order is a random permutation. Its time grows with their number: 185 ms per
# step for 40,000 on a CPU.
PERMUTED = 4096
_ROUNDS = 8


class EncodedExamples(NamedTuple):
    """Training examples as they stay on the devices.

    Attributes:
        mean, std: of the autoencoder's posterior, scaled latents [n, h, w, c]; std 0 for plain data. Stored flat,
            [n, h*w*c], where c is small: TPUs pad the last axis to 128, so 4 channels would take 32 times the memory.
        cond: distinct conditions: any pytree with leading axis u (token ids or text states).
        cond_index: condition of each example, in [0, u), [n]; or k conditions of each, [n, k], one drawn per step.
        of_example: conditions of single examples (size and crop, a low-resolution picture): None, or a dict with
            leading axis n, whose entries join `cond`, which must then be a dict.
        weight: weight of every latent pixel in the loss, flat like `mean` with one channel; None: equal weights.
    """

    mean: Float[Array, "n ..."]
    std: Float[Array, "n ..."]
    cond: PyTree
    cond_index: Int[Array, "n"] | Int[Array, "n k"]
    of_example: dict[str, Array] | None = None
    weight: Float[Array, "n ..."] | None = None


class Numbers(NamedTuple):
    """A run's settings that are arguments of its program: runs that differ in them alone share one compiled program.

    Attributes: named like the config's fields. What 0 turns off there (clipping, min-SNR, the average, dropout) is no
        part of the program then, and its number is not read.
    """

    learning_rate: Number
    text_encoder_multiplier: Number
    weight_decay: Number
    clip_norm: Number
    prior_weight: Number
    snr_gamma: Number
    ema_decay: Number
    caption_dropout: Number


class TrainingData(NamedTuple):
    """The subject's examples, and the class examples or None to train without prior preservation.

    Attributes:
        order: rows for every step, from `ordered`: of `instance`, then of `prior` unless its examples are paired; None:
            they are picked in the step.
        numbers: of the run of these examples; None: the program has those of its config as constants.
    """

    instance: EncodedExamples
    prior: EncodedExamples | None
    order: Int[Array, "steps rows"] | None = None
    numbers: Numbers | None = None


def room(count: int) -> int:
    """Rows that arrays of `count` examples or steps have in a program: few different numbers, so that runs of other
    counts share it. 16, 64, 256 or 1,024; above, at most an eighth more than `count`."""
    if count <= 1024:
        return next(rows for rows in (16, 64, 256, 1024) if count <= rows)
    step = 1 << ((count - 1).bit_length() - 4)
    return -(-count // step) * step


def filled(x: Array | np.ndarray, rows: int) -> Array:
    """The array with `rows` rows, the new ones copies of the last."""
    return jnp.concatenate([x, jnp.repeat(x[-1:], rows - len(x), axis=0)]) if len(x) < rows else jnp.asarray(x)


def with_room(examples: EncodedExamples, rows: int | None = None, conditions: int | None = None) -> EncodedExamples:
    """The examples in arrays of `rows` examples and `conditions` conditions, by default as many as `room` gives. Added
    rows are in no order; the last condition is the same as before."""
    rows = rows or room(len(examples.mean))
    conditions = conditions or room(len(jax.tree.leaves(examples.cond)[0]))
    by_example = examples._replace(cond=None)
    return jax.tree.map(lambda x: filled(x, rows), by_example)._replace(
        cond=jax.tree.map(lambda x: filled(x, conditions), examples.cond)
    )


def draw(
    data: TrainingData,
    process: Process,
    batch_size: int,
    key: Key[Array, ""],
    step: Int[Array, ""] | int,
    shape: tuple[int, ...] | None = None,
    augment: Augment | None = None,
    paired: bool = False,
    dropout: Number | None = None,
) -> Batch:
    """The noised batch of step `step`: `batch_size` instance examples, then as many prior examples if there are any.

    Args:
        data: examples to draw from.
        process: distribution of the times.
        batch_size: number of instance examples.
        key: the run's key.
        step: number of the step.
        shape: shape of one example, where the data are flat.
        augment: function (condition of one example, key) -> condition, such as noise on a low-resolution picture.
        paired: whether the prior examples are the instance examples, with the same noise and times.
        dropout: probability with which an example has the last row of `cond`, the empty caption, as its condition;
            None for none.
    """
    data = jax.tree.map(jnp.asarray, data)  # examples may be arrays of the host
    _, noise_key = jax.random.split(key)
    step_key = jax.random.fold_in(noise_key, step)
    number = jnp.arange(batch_size * (1 if data.prior is None else 2))
    example_keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(number % batch_size if paired else number)
    rows = rows_of(data, batch_size, key, step, paired) if data.order is None else data.order[step]
    halves = [_take(data.instance, rows[:batch_size], example_keys[:batch_size], dropout)]
    if data.prior is not None:
        halves.append(_take(data.prior, rows[-batch_size:], example_keys[batch_size:], dropout))
    mean, std, cond, weight = jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)
    if shape is not None:
        mean, std = mean.reshape(-1, *shape), std.reshape(-1, *shape)
        weight = None if weight is None else weight.reshape(-1, *shape[:-1], 1)

    keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys)
    posterior_key, eps_key, t_key = keys[:, 0], keys[:, 1], keys[:, 2]
    normal = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))
    if augment is not None:
        cond = jax.vmap(augment)(cond, jax.vmap(lambda k: jax.random.fold_in(k, 3))(example_keys))
    return Batch(mean + std * normal(posterior_key), normal(eps_key), jax.vmap(process.draw_t)(t_key), cond, weight)


def _take(
    examples: EncodedExamples, index: Int[Array, "b"], keys: Key[Array, "b"], dropout: Number | None
) -> tuple[Array, Array, PyTree, Array | None]:
    """Mean, standard deviation, condition and weight of the examples `index`; `keys` draw their conditions."""
    row = examples.cond_index[index]
    if row.ndim == 2:
        draw_column = jax.vmap(lambda k: jax.random.randint(jax.random.fold_in(k, 4), (1,), 0, row.shape[1]))
        row = jnp.take_along_axis(row, draw_column(keys), axis=1)[:, 0]
    if dropout is not None:
        is_dropped = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 5), dropout))(keys)
        row = jnp.where(is_dropped, len(jax.tree.leaves(examples.cond)[0]) - 1, row)
    cond = jax.tree.map(lambda table: table[row], examples.cond)
    if examples.of_example is not None:
        cond = cond | jax.tree.map(lambda table: table[index], examples.of_example)
    return examples.mean[index], examples.std[index], cond, None if examples.weight is None else examples.weight[index]


def rows_of(
    data: TrainingData, batch_size: int, key: Key[Array, ""], step: Int[Array, ""] | int, paired: bool = False
) -> Int[Array, "rows"]:
    """The rows of a step: see `TrainingData.order`."""
    instance_key, prior_key = jax.random.split(jax.random.split(key)[0])
    rows = pick(len(data.instance.mean), batch_size, instance_key, step)
    if data.prior is None or paired:
        return rows
    return jnp.concatenate([rows, pick(len(data.prior.mean), batch_size, prior_key, step)])


def ordered(
    data: TrainingData, batch_size: int, key: Key[Array, ""], steps: int, paired: bool = False
) -> Int[Array, "steps rows"]:
    """The rows of the first `steps` steps of a run with `key`, as `draw` picks them."""
    rows = lambda step: rows_of(data, batch_size, key, step, paired)  # noqa: E731
    return jax.jit(lambda: jax.lax.map(rows, jnp.arange(steps)))()


def picks(n: int, count: int, key: Key[Array, ""], steps: int) -> Int[Array, "steps count"]:
    """The instance rows alone of `ordered`."""
    instance_key, _ = jax.random.split(jax.random.split(key)[0])
    return jax.jit(lambda: jax.lax.map(lambda step: pick(n, count, instance_key, step), jnp.arange(steps)))()


def pick(n: int, count: int, key: Key[Array, ""], step: Int[Array, ""] | int) -> Int[Array, "count"]:
    """Which of `n` examples step `step` uses: every example once per epoch, each epoch in an order of its own."""
    number = step * count + jnp.arange(count)
    if n > PERMUTED:
        return jax.vmap(lambda i: _scattered(i % n, n, jax.random.fold_in(key, i // n)))(number)
    first = number[0] // n
    # `count` consecutive numbers touch at most this many epochs.
    epochs = first + jnp.arange((count - 1) // n + 2)
    orders = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), n))(epochs)
    return orders[number // n - first, number % n]


def _scattered(position: Int[Array, ""], n: int, key: Key[Array, ""]) -> Int[Array, ""]:
    """The value of a random bijection of [0, n) at `position`, without making the whole permutation: a Feistel network
    on the next power of two, applied until the value is below n (cycle walking: Black and Rogaway, CT-RSA 2002)."""
    bits = (n - 1).bit_length()
    round_keys = jax.random.bits(key, (_ROUNDS,), jnp.uint32)
    encrypt = lambda value: _feistel(value, bits, round_keys)  # noqa: E731
    value = jax.lax.while_loop(lambda value: value >= n, encrypt, encrypt(position.astype(jnp.uint32)))
    return value.astype(position.dtype)


def _feistel(value: UInt[Array, ""], bits: int, round_keys: UInt[Array, "r"]) -> UInt[Array, ""]:
    """A bijection of [0, 2^bits): every round xors one half with a hash of the other and exchanges them."""
    left, right = bits - bits // 2, bits // 2
    for i in range(len(round_keys)):
        low = value & ((1 << right) - 1)
        high = (value >> right) ^ (_mixed(low ^ round_keys[i]) & ((1 << left) - 1))
        value = low << left | high
        left, right = right, left
    return value


def _mixed(x: UInt[Array, ""]) -> UInt[Array, ""]:
    """A hash of 32 bits in which every bit depends on all (the finaliser of MurmurHash3)."""
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16
