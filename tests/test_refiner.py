"""The decoder's convolutional upsampler: its shapes, what it starts from, and that
detail of the latents reaches it.
"""

import pytest
import torch
from tiny_world import SIZE, one_sentence, randn, shake, tiny_config

from gsv3d_lib import stages
from gsv3d_lib.cameras import orbit_cameras
from gsv3d_lib.decoder import GaussianDecoder, Refiner, RefinerBlock, build_decoder
from gsv3d_lib.system.errors import UserError
from gsv3d_lib.weights.checkpoint import save_model

LATENT = SIZE // 8
CAMERAS = [orbit_cameras([0.0, 90.0], 10.0, SIZE)]


def given(config, side: int = LATENT, seed: int = 0):
    """Latents of two views, their cameras, and DINO features."""
    return (
        randn(1, 2, 4, side, side, seed=seed),
        CAMERAS,
        randn(1, 5, config.dino_width, seed=seed + 1),
    )


def refined(patch: int = 1, channels=(16, 8), **changes):
    return tiny_config(
        decoder_patch=patch,
        decoder_refiner=channels,
        decoder_upsample=2 ** len(channels),
        **changes,
    )


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("channels", [(8,), (16, 8)])
def test_each_level_doubles_the_grid_of_tokens(patch, channels):
    config = refined(patch, channels)
    decoder = build_decoder(config)
    maps, origins, directions = decoder.output_maps(*given(config))
    side = LATENT // patch * 2 ** len(channels)
    assert maps.shape == (1, 2, side, side, 12) and origins.shape == directions.shape == (
        1,
        2,
        side,
        side,
        3,
    )
    assert len(decoder(*given(config))[0]) == 2 * side * side


def test_a_level_begins_as_one_convolution_and_a_block_adds_nothing_at_first():
    block, x = RefinerBlock(12, 8), randn(1, 12, 5, 5)
    assert torch.equal(block(x), block.inner(x))
    refiner, latents = Refiner(6, (8, 8)), randn(2, 4, 4, 4)
    assert refiner(randn(2, 6, 2, 2), latents).shape == (2, 8, 8, 8)


def test_each_level_sees_its_own_latent():
    """A latent that changes at one place changes the refiner's output there, and not
    far away.
    """
    refiner = shake(Refiner(6, (8,)))
    for block in refiner.blocks:
        block.norm = torch.nn.Identity()  # it looks at the whole picture
    tokens, latents = randn(1, 6, 8, 8), randn(1, 4, 16, 16)
    other = latents.clone()
    other[..., 3, 3] += 1
    change = (refiner(tokens, latents) - refiner(tokens, other)).abs().amax((0, 1))
    assert change[3, 3] > 1e-4
    assert change[6:].max() == change[:, 6:].max() == 0  # two convolutions reach two pixels


def test_gradients_reach_the_latents_through_the_refiner():
    config = refined()
    decoder = shake(build_decoder(config))
    for p in decoder.parameters():
        p.requires_grad_(False)
    latents, cameras, features = given(config)
    latents.requires_grad_()
    decoder(latents, cameras, features)[0].colors.sum().backward()
    assert torch.isfinite(latents.grad).all() and (latents.grad != 0).all()


def test_a_refined_decoder_is_saved_and_opened(tmp_path):
    config = refined()
    decoder = shake(build_decoder(config)).eval()
    decoder.save_pretrained(tmp_path)
    again = GaussianDecoder.from_pretrained(tmp_path)
    assert tuple(again.config.refiner_channels) == (16, 8) and not hasattr(again, "upsampler")
    with torch.no_grad():
        before, after = (model.output_maps(*given(config))[0] for model in (decoder, again))
    assert torch.equal(before, after)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_linear_decoder_grows_a_refiner_and_keeps_its_transformer(patch):
    """Of the same pictures, and of pictures of twice the side, for which its first
    layer is doubled.
    """
    linear, config = shake(build_decoder(tiny_config())), refined(patch)
    grown = linear.grown_to(config)
    old, new = linear.state_dict(), grown.state_dict()
    kept = [name for name in new if not name.startswith(("refiner", "to_maps", "embed"))]
    assert kept and all(torch.equal(new[name], old[name]) for name in kept)
    first = old["embed.weight"]
    doubled = first.repeat_interleave(2, -1).repeat_interleave(2, -2) / 4
    assert torch.equal(new["embed.weight"], first if patch == 1 else doubled)
    maps = grown.output_maps(*given(config))[0]
    assert maps.shape[2] == 4 * LATENT // patch and tuple(grown.config.refiner_channels) == (16, 8)


def test_a_decoder_that_fits_stays_as_it_is():
    linear, with_refiner = build_decoder(tiny_config()), build_decoder(refined())
    assert linear.grown_to(tiny_config()) is linear
    assert with_refiner.grown_to(refined()) is with_refiner
    assert with_refiner.grown_to(refined(2)) is with_refiner  # a refiner is not doubled


@pytest.mark.parametrize(
    ("start", "wanted"),
    [
        (tiny_config(), refined(decoder_width=64)),
        (refined(), refined(2)),
        (refined(), refined(channels=(8, 8))),
        (refined(), tiny_config()),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(start, wanted, tmp_path):
    save_model(build_decoder(start), tmp_path, "decoder", start)
    with pytest.raises(UserError, match="decoder in .* is not of this configuration") as error:
        stages.initial("decoder", wanted, tmp_path)
    one_sentence(error)


@pytest.mark.parametrize(
    "channels", [(7, 8), (0, 8), (-8, 8), ("a", "b"), (8.0, 8.0), (8,), (8, 8, 8)]
)
def test_refiners_that_cannot_be_are_one_sentence(channels):
    with pytest.raises(UserError, match="decoder_refiner") as error:
        tiny_config(decoder_refiner=channels, decoder_upsample=4)
    one_sentence(error)
    assert tiny_config().decoder_refiner == ()
