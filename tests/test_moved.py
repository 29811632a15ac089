"""What should train and does not is found, per part."""

import jax.numpy as jnp
import numpy as np
import pytest

from dreambooth_jax.runs.moved import NothingMoved, check_moved, checksums


def params(seed: int):
    rng = np.random.default_rng(seed)
    names = ("unet.a.kernel", "unet.a.bias", "text_encoder.b.kernel", "text_encoder.b.lora_A.kernel")
    return {name: jnp.asarray(rng.normal(size=(5, 7)), jnp.float32) for name in names}


def test_the_smallest_change_of_one_number_is_seen():
    before = params(0)
    assert check_moved(checksums(before), checksums(params(1)), 2).startswith("trained: text_encoder, unet changed")
    kernel = np.array(before["unet.a.bias"])
    kernel[3, 4] = np.nextafter(kernel[3, 4], np.float32(9))
    with pytest.raises(NothingMoved, match=r"^text_encoder should train and did not change in 2 steps"):
        check_moved(checksums(before), checksums(before | {"unet.a.bias": jnp.asarray(kernel)}), 2)


def test_bfloat16_that_swallows_an_update_is_seen():
    before = {"unet.a": jnp.ones(8, jnp.bfloat16)}
    after = {"unet.a": before["unet.a"] + jnp.asarray(1e-4, jnp.bfloat16)}
    with pytest.raises(NothingMoved, match="unet"):
        check_moved(checksums(before), checksums(after), 2)


def test_new_tokens_are_a_part_of_their_own():
    """Pivotal tuning holds them while the text encoder's factors go on."""
    before = params(0) | {"text_encoder.text_model.embeddings.token_embedding.new": jnp.ones((1, 7))}
    names = checksums(before).keys()
    assert names == {"unet", "text_encoder", "text_encoder (new tokens)"}
    after = checksums(params(1) | {name: value for name, value in before.items() if name.endswith(".new")})
    with pytest.raises(NothingMoved, match=r"^text_encoder \(new tokens\) should train"):
        check_moved(checksums(before), after, 2)
