"""The networks: their size at paper scale, their kinship with diffusers, what the
decoder promises of geometry.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from safetensors import safe_open
from tiny_world import SCALE, SIZE, ball_views, kept_bytes, randn, shake, tiny_config
from torch import nn

from gsv3d_lib.cameras import DISTANCE, orbit_cameras, ray_grid, sv3d_azimuths
from gsv3d_lib.config import preset
from gsv3d_lib.decoder import SWEEP, GaussianDecoder, build_decoder, doubled, plane_sweep
from gsv3d_lib.encoders import (
    CLIP_MEAN,
    CLIP_STD,
    build_clip,
    build_dino,
    clip_token,
    condition_from,
    dino_features,
    normalised,
)
from gsv3d_lib.lora import add_lora, lora_parameters
from gsv3d_lib.unet import SV3DUNet, angle_features, build_unet, deepened
from gsv3d_lib.vae import (
    GroupedVAE,
    build_vae,
    calibrate,
    decode_scaled,
    encode,
    encode_scaled,
    to_images,
    to_network,
)

CONFIG = tiny_config()
FRAMES = 4


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- presets


def test_the_paper_preset_has_sv3d_and_the_lora_their_exact_sizes():
    with torch.device("meta"):
        unet = build_unet(preset("paper"))
    assert parameters(unet) == 1_525_278_442  # SV3D_p
    assert unet.config.projection_class_embeddings_input_dim == 1280
    with torch.device("meta"):
        add_lora(unet, preset("paper").lora_rank)
    lora = lora_parameters(unet)
    assert len(lora) == 2 * 256 and sum(p.numel() for p in lora.values()) == 6_639_616
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == set(lora)


def test_the_paper_preset_has_a_vit_base_decoder_and_clip_h():
    with torch.device("meta"):
        decoder, clip = build_decoder(preset("paper")), build_clip(preset("paper"))
    assert 110e6 < parameters(decoder) < 125e6
    assert 620e6 < parameters(clip) < 640e6  # OpenCLIP ViT-H/14's vision tower: 632 M


def test_configurations_name_what_is_wrong():
    with pytest.raises(ValueError, match="tiny, small, paper"):
        preset("huge")
    for changes in (
        {"vae_schedule.steps": 0},
        {"stage1.batch": 0},
        {"image_size": 60},
        {"copies": 0},
        {"dino": "dinov3"},
    ):
        with pytest.raises(ValueError, match="got") as error:
            preset("tiny", **changes)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no field 'frames'"):
        preset("tiny", frames=3)
    # what papermill makes of a YAML number without a point
    with pytest.raises(ValueError, match="'1e-3'"):
        preset("tiny", lambda_3d="1e-3")
    assert preset("tiny", lambda_3d=2).lambda_3d == 2 and preset("tiny").lambda_3d == 1.0


# ---------------------------------------------------------------- U-Net


@pytest.fixture(scope="module")
def unet() -> SV3DUNet:
    torch.manual_seed(0)
    return shake(build_unet(CONFIG)).eval()


@pytest.fixture(scope="module")
def twin(unet, tmp_path_factory) -> UNetSpatioTemporalConditionModel:
    """Our saved weights, opened by diffusers' own class."""
    folder = tmp_path_factory.mktemp("unet")
    unet.save_pretrained(folder)
    return UNetSpatioTemporalConditionModel.from_pretrained(folder, local_files_only=True).eval()


def unet_inputs(batch: int = 2, frames: int = FRAMES) -> dict:
    return dict(
        sample=randn(batch, frames, 8, 4, 4),
        timestep=torch.linspace(-1, 1, batch),
        token=randn(batch, 1, CONFIG.clip_dim, seed=1),
        polar=torch.linspace(1.1, 1.6, batch)[:, None].expand(-1, frames).contiguous(),
        azimuth=torch.arange(frames).float().expand(batch, -1).contiguous(),
    )


def test_saved_weights_open_in_diffusers(unet, twin):
    ours, theirs = unet.state_dict(), twin.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@torch.no_grad()
def test_with_one_angle_for_all_frames_we_are_diffusers(unet, twin):
    """diffusers adds one embedding to the whole clip. Given our features, its forward
    must say what ours says.
    """
    inputs = unet_inputs()
    inputs["azimuth"] = torch.tensor([0.4, 2.0])[:, None].expand(-1, FRAMES).contiguous()
    # [B, 1280], instead of time ids
    features = angle_features(inputs["polar"], inputs["azimuth"], 1e-5)[:, 0]
    twin.add_time_proj = nn.Identity()
    theirs = twin(
        inputs["sample"], inputs["timestep"], inputs["token"], added_time_ids=features
    ).sample
    assert torch.allclose(unet(**inputs), theirs, atol=1e-5)


@torch.no_grad()
def test_angles_act_per_frame_and_orbits_do_not_mix(unet):
    inputs = unet_inputs()
    before = unet(**inputs)
    inputs["azimuth"][0, 2] += 1.0
    change = (unet(**inputs) - before).abs().amax((2, 3, 4))
    # most in its own frame, neighbours through the temporal layers
    assert change[0, 2] == change.max() > 1e-3
    assert change[1].max() < 1e-6
    inputs["polar"][1, 0] += 0.5
    assert (unet(**inputs) - before).abs()[1].max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("layers, attention", [(1, (True, True)), (2, (True, False))])
def test_a_deepened_unet_begins_as_the_old_one_and_uses_its_new_layers(layers, attention):
    old = shake(build_unet(tiny_config(unet_layers=layers, unet_attention=attention))).eval()
    new = deepened(old).eval()
    assert new.config.layers_per_block == layers + 1 and parameters(new) > 1.2 * parameters(old)
    expected = old(**unet_inputs())
    assert expected.std() > 0.05
    assert torch.allclose(new(**unet_inputs()), expected, atol=1e-5)
    new.up_blocks[1].resnets[1].spatial_res_block.conv2.weight.add_(0.1)  # of a new layer
    assert (new(**unet_inputs()) - expected).abs().max() > 1e-3


def test_wrong_unet_inputs_are_refused_with_the_shape(unet):
    for name, value, message in (
        ("sample", randn(2, FRAMES, 4, 4, 4), r"\[B, N, 8, h, w\].*\(2, 4, 4, 4, 4\)"),
        ("sample", randn(2, FRAMES, 8, 5, 4), "multiples of 2"),
        ("polar", torch.zeros(2, 3), r"\(2, 3\)"),
        ("azimuth", torch.zeros(FRAMES), r"\(4,\)"),
        ("token", randn(2, CONFIG.clip_dim), r"\(2, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            unet(**unet_inputs() | {name: value})


# ---------------------------------------------------------------- VAE


@pytest.fixture
def vae() -> GroupedVAE:
    torch.manual_seed(1)
    return shake(build_vae(CONFIG)).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return ball_views(1).scene(0).rgb[:6]


def test_images_and_networks_convert_both_ways(images):
    network = to_network(images)
    assert network.shape == (6, 3, SIZE, SIZE) and network.min() >= -1 and network.max() == 1
    assert torch.allclose(to_images(network), images, atol=1e-6)
    with pytest.raises(ValueError, match=r"\(3, 32, 32\)"):
        to_network(images[0].movedim(-1, 0))


@torch.no_grad()
def test_latents_are_modes_and_scaled_once(vae, images):
    latents = encode(vae, images[None])
    assert latents.shape == (1, 6, 4, SIZE // 8, SIZE // 8)
    assert torch.equal(encode(vae, images), latents[0])  # the mode: nothing is drawn
    assert torch.allclose(encode_scaled(vae, images), SCALE * latents[0])
    with pytest.raises(ValueError, match=r"\(1, 6, 4, 4, 4\)"):
        decode_scaled(vae, latents)


@torch.no_grad()
def test_calibration_gives_unit_variance_and_changes_no_reconstruction(vae, images):
    before = decode_scaled(vae, encode_scaled(vae, images))
    spread = vae.encode(to_network(images)).latent_dist
    deviation = calibrate(vae, images)
    assert (deviation - 1).abs().min() > 0.05  # there was something to do
    latents = encode_scaled(vae, images)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(decode_scaled(vae, latents), before, atol=1e-4)
    # the posterior scales as a whole, not its mean alone
    after = vae.encode(to_network(images)).latent_dist
    assert torch.allclose(after.std * deviation[:, None, None], spread.std, rtol=1e-3)
    assert torch.allclose(calibrate(vae, images), torch.ones(4), atol=1e-3)


@torch.no_grad()
def test_a_fresh_vae_starts_without_its_residual_branches(images):
    """Only convolutions and norms act at first, and the noise of sampling is small."""
    torch.manual_seed(1)
    fresh = build_vae(CONFIG).eval()
    block = fresh.encoder.down_blocks[0].resnets[0]
    hidden = randn(1, 32, 8, 8)
    assert torch.equal(block(hidden, None), hidden)  # the identity where the width stays
    assert 0.02 < fresh.encode(to_network(images)).latent_dist.std.median() < 0.12


@torch.no_grad()
def test_norm_groups_survive_saving(vae, images, tmp_path):
    vae.save_pretrained(tmp_path)
    again = GroupedVAE.from_pretrained(tmp_path, local_files_only=True).eval()
    groups = {m.num_groups for m in again.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {CONFIG.vae_norm_groups} and CONFIG.vae_norm_groups != 32
    assert torch.equal(encode(again, images), encode(vae, images))


# ---------------------------------------------------------------- image encoders


@torch.no_grad()
def test_clip_gives_one_token_and_dino_one_feature_per_patch(images):
    torch.manual_seed(0)
    clip, dino = build_clip(CONFIG).eval(), build_dino(CONFIG).eval()
    assert clip_token(clip, images).shape == (6, 1, CONFIG.clip_dim)
    patches = (CONFIG.dino_size // CONFIG.dino_patch) ** 2
    assert dino_features(dino, images).shape == (6, 1 + patches, CONFIG.dino_width)
    large = torch.nn.functional.interpolate(images.movedim(-1, 1), scale_factor=3).movedim(1, -1)
    assert clip_token(clip, large).shape == (6, 1, CONFIG.clip_dim)  # any size comes in


def test_normalisation_is_the_published_one():
    grey = torch.full((1, 8, 8, 3), 0.25)
    expected = (0.25 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert torch.allclose(normalised(grey, 8, CLIP_MEAN, CLIP_STD)[0, :, 3, 5], expected, atol=1e-6)
    assert torch.allclose(normalised(grey, 4, CLIP_MEAN, CLIP_STD)[0, :, 1, 2], expected, atol=1e-5)


@torch.no_grad()
def test_the_condition_holds_the_unscaled_latent(vae, images):
    torch.manual_seed(0)
    clip = build_clip(CONFIG).eval()
    polar, azimuth = torch.full((1, FRAMES), 1.3), sv3d_azimuths(FRAMES)[None].deg2rad()
    condition = condition_from(images[:1], polar, azimuth, vae, clip, CONFIG)
    assert torch.equal(condition.latent, encode(vae, images[:1]))
    assert torch.equal(condition.token, clip_token(clip, images[:1])) and condition.cond_aug == 1e-5


# ----------------------------------------------------------- Gaussian Splatting Decoder


def cameras_of(frames: int, elevation: float = 10.0):
    return orbit_cameras(sv3d_azimuths(frames), elevation, SIZE)


def features(batch: int = 1) -> torch.Tensor:
    return randn(batch, 5, CONFIG.dino_width, seed=4)


@pytest.fixture(scope="module")
def decoder() -> GaussianDecoder:
    """All heads away from zero, so that every output depends on the input."""
    torch.manual_seed(2)
    return shake(build_decoder(CONFIG), size=0.2).eval()


@torch.no_grad()
def test_a_fresh_decoder_is_a_faint_plane_through_the_centre():
    torch.manual_seed(2)
    fresh, cameras = build_decoder(CONFIG), cameras_of(FRAMES)
    (scene,) = fresh(randn(1, FRAMES, 4, 4, 4), [cameras], features())
    side = 4 * CONFIG.decoder_upsample
    assert len(scene) == FRAMES * side * side
    origins, directions = ray_grid(cameras, side, side)
    expected = origins + DISTANCE * directions  # at the camera's distance along each ray
    assert torch.allclose(scene.means, expected.reshape(-1, 3), atol=1e-5)
    assert torch.allclose(scene.opacities, torch.tensor(-2.0).sigmoid().expand(len(scene)))
    low, high = (2 * s for s in CONFIG.scale_range)
    assert torch.allclose(scene.scales, torch.tensor(math.sqrt(low * high)).expand_as(scene.scales))
    assert torch.allclose(scene.quats.norm(dim=-1), torch.ones(len(scene)), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("extreme", [-40.0, 40.0])
def test_activations_are_bounded(decoder, extreme):
    origins, directions = ray_grid(cameras_of(1), 2, 2)
    scene = decoder.to_gaussians(torch.full((1, 2, 2, 12), extreme), origins, directions)
    distance = DISTANCE + math.copysign(CONFIG.object_radius, extreme)
    assert torch.allclose(
        (scene.means - origins.reshape(-1, 3)).norm(dim=-1), torch.tensor(distance), atol=1e-5
    )
    scale = 2 * CONFIG.scale_range[extreme > 0]
    assert torch.allclose(scene.scales, torch.tensor(scale), rtol=1e-4)
    bound = 1.0 if extreme > 0 else 0.0
    assert torch.allclose(scene.opacities, torch.tensor(bound)) and torch.allclose(
        scene.colors, torch.tensor(bound)
    )


@torch.no_grad()
def test_the_number_of_views_is_free(decoder):
    for frames in (1, 2, 7):
        (scene,) = decoder(randn(1, frames, 4, 4, 4), [cameras_of(frames)], features())
        assert len(scene) == frames * 64 and all(torch.isfinite(t).all() for t in scene.tensors())


@torch.no_grad()
def test_views_are_told_apart_by_their_rays_alone(decoder):
    """Permuting the views together with their cameras permutes the Gaussians, and
    nothing else.
    """
    latents, cameras, order = randn(1, FRAMES, 4, 4, 4), cameras_of(FRAMES), [2, 0, 3, 1]
    (scene,) = decoder(latents, [cameras], features())
    (permuted,) = decoder(latents[:, order], [cameras[order]], features())
    for before, after in zip(scene.tensors(), permuted.tensors(), strict=True):
        assert torch.allclose(
            before.unflatten(0, (FRAMES, -1))[order].flatten(0, 1), after, atol=1e-5
        )
    # without their cameras it is another object
    (mixed,) = decoder(latents[:, order], [cameras], features())
    assert (
        mixed.colors.unflatten(0, (FRAMES, -1)) - scene.colors.unflatten(0, (FRAMES, -1))[order]
    ).abs().max() > 1e-3


@torch.no_grad()
def test_a_batch_is_its_objects_one_by_one(decoder):
    latents, cameras, dino = (
        randn(2, FRAMES, 4, 4, 4),
        [cameras_of(FRAMES), cameras_of(FRAMES, 25.0)],
        features(2),
    )
    together = decoder(latents, cameras, dino)
    for b, scene in enumerate(together):
        (alone,) = decoder(latents[b : b + 1], cameras[b : b + 1], dino[b : b + 1])
        assert torch.allclose(scene.means, alone.means, atol=1e-5)
        assert torch.allclose(scene.colors, alone.colors, atol=1e-5)


@torch.no_grad()
def test_dino_matters_in_every_block_and_can_be_left_out(decoder):
    latents, cameras = randn(1, FRAMES, 4, 4, 4), [cameras_of(FRAMES)]
    (a,), (b,) = (
        decoder(latents, cameras, features()),
        decoder(latents, cameras, features() * randn(1, 5, 1, seed=9)),
    )
    assert (a.colors - b.colors).abs().max() > 1e-3
    assert all(block.cross is not None for block in decoder.blocks)
    without = build_decoder(tiny_config(dino="none"))
    assert all(block.cross is None for block in without.blocks)
    assert len(without(latents, cameras)[0]) == len(a)
    assert not [
        name for name, _ in without.named_parameters() if "cross" in name or "context" in name
    ]


@torch.no_grad()
def test_patches_and_upsampling_set_the_number_of_gaussians():
    for patch, upsample, side in ((1, 4, 16), (2, 2, 4), (2, 4, 8)):
        decoder = build_decoder(
            tiny_config(decoder_patch=patch, decoder_upsample=upsample, dino="none")
        )
        maps, origins, _ = decoder.output_maps(randn(1, 2, 4, 4, 4), [cameras_of(2)])
        assert maps.shape == (1, 2, side, side, 12) and origins.shape == (1, 2, side, side, 3)


@torch.no_grad()
def test_a_doubled_decoder_says_of_enlarged_latents_what_the_old_one_says():
    old = shake(build_decoder(tiny_config(decoder_planes=0)), size=0.2)
    old.embed.weight[:, 4:] = 0  # rays through finer pixels are other rays
    # and neighbours other neighbours
    old.to_maps.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    new = doubled(old)
    assert (new.config.patch, new.config.upsample) == (2, 4)
    latents = randn(1, 2, 4, 4, 4)
    fine = latents.repeat_interleave(2, -1).repeat_interleave(2, -2)
    expected, _, _ = old.output_maps(latents, [cameras_of(2)], features())
    maps, _, _ = new.output_maps(fine, [cameras_of(2)], features())
    assert maps.shape == (1, 2, 16, 16, 12) and maps.std() > 0.1
    assert torch.allclose(maps, expected.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-5)


@torch.no_grad()
def test_the_plane_sweep_reads_where_points_project():
    """View 0 is zero, view 1 holds u / width as a ramp, which bilinear reading
    reproduces: the largest value of the two is then the projected u of each point on
    each ray, in closed form.
    """
    cameras, side, planes = orbit_cameras([0.0, 50.0], [10.0, 30.0], SIZE), 16, 5
    ramp = (torch.arange(side) + 0.5) / side
    latents = torch.stack([torch.zeros(4, side, side), ramp.expand(4, side, side)])
    # a small ball: every point is inside both frames
    config = SimpleNamespace(planes=planes, object_radius=0.4)
    swept = plane_sweep(latents, cameras, (6, 6), config).unflatten(1, (planes, len(SWEEP), 4))
    assert swept.shape == (2 * 6 * 6, planes, 4, 4)

    origins, directions = ray_grid(cameras, 6, 6)
    steps = DISTANCE + torch.linspace(-0.4, 0.4, planes)
    points = (origins[..., None, :] + steps[:, None] * directions[..., None, :]).reshape(
        -1, planes, 3
    )
    local = points @ cameras.viewmats[1, :3, :3].T + cameras.viewmats[1, :3, 3]
    u = (cameras.Ks[1, 0, 0] * local[..., 0] / local[..., 2] + cameras.Ks[1, 0, 2]) / SIZE
    inside = (u > 0.5 / side) & (u < 1 - 0.5 / side)
    inside &= (local[..., 1] / local[..., 2]).abs() < 0.28  # the field of view ends at 0.30
    # mean, deviation, smallest, largest
    expected = torch.stack([u / 2, u / 2, torch.zeros_like(u), u], -1)
    assert inside.float().mean() > 0.7
    for channel in range(4):
        assert torch.allclose(swept[..., channel][inside], expected[inside], atol=1e-4)


@torch.no_grad()
def test_along_its_own_ray_a_view_reads_its_own_pixel():
    latents = randn(1, 4, 4, 4)
    config = SimpleNamespace(planes=3, object_radius=1.0)
    swept = plane_sweep(latents, cameras_of(1), (4, 4), config).unflatten(1, (3, len(SWEEP), 4))
    pixels = latents[0].flatten(1).T[:, None].expand(-1, 3, -1)
    for name, expected in (("mean", pixels), ("smallest", pixels), ("largest", pixels)):
        assert torch.allclose(swept[:, :, SWEEP.index(name)], expected, atol=1e-4)
    assert swept[:, :, SWEEP.index("deviation")].abs().max() < 1e-5


def test_the_sweep_has_finite_gradients_where_views_agree(decoder):
    """The deviation of equal values has no derivative; a plain background must not turn
    it into NaN.
    """
    latents = torch.full((1, FRAMES, 4, 4, 4), 0.3, requires_grad=True)
    decoder(latents, [cameras_of(FRAMES)], features())[0].colors.sum().backward()
    assert torch.isfinite(latents.grad).all() and (latents.grad != 0).any()
    decoder.zero_grad(set_to_none=True)


@torch.no_grad()
def test_the_sweep_can_be_left_out():
    assert preset("paper").decoder_planes == 0 and CONFIG.decoder_planes > 0
    without = build_decoder(CONFIG.replace(decoder_planes=0))
    assert without.sweep is None and not [
        name for name, _ in without.named_parameters() if "sweep" in name
    ]
    assert len(without(randn(1, 2, 4, 4, 4), [cameras_of(2)], features())[0]) == 2 * 64


def test_wrong_decoder_inputs_are_refused_with_the_shape(decoder):
    latents, cameras = randn(2, FRAMES, 4, 4, 4), [cameras_of(FRAMES)] * 2
    for arguments, message in (
        ((latents[0], cameras, features(2)), r"\[B, N, 4, h, w\]; got \(4, 4, 4, 4\)"),
        ((latents[:, :, :3], cameras, features(2)), r"\(2, 4, 3, 4, 4\)"),
        ((latents, cameras[:1], features(2)), r"2 objects of 4 views.*\[4\]"),
        ((latents, [cameras_of(3)] * 2, features(2)), r"got \[3, 3\]"),
        ((latents, cameras, None), "got None"),
        ((latents, cameras, features(1)), r"\[2, T, 32\]; got \(1, 5, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder(*arguments)


@torch.no_grad()
def test_a_saved_decoder_is_the_same_decoder(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    again = GaussianDecoder.from_pretrained(tmp_path, local_files_only=True).eval()
    inputs = randn(1, FRAMES, 4, 4, 4), [cameras_of(FRAMES)], features()
    (before,), (after,) = decoder(*inputs), again(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), after.tensors(), strict=True))
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(decoder.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["upsample"] == CONFIG.decoder_upsample


# --------------------------------------------------------------- gradient checkpointing


def gradients(model, forward) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    forward().pow(2).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", ["unet", "decoder"])
def test_checkpointing_changes_memory_and_not_gradients(build):
    torch.manual_seed(3)
    if build == "unet":
        model, inputs = shake(build_unet(CONFIG)), unet_inputs()

        def forward():
            return model(**inputs)
    else:
        model, given = (
            shake(build_decoder(CONFIG)),
            (randn(1, 3, 4, 4, 4), [cameras_of(3)], features()),
        )

        def forward():
            return model.output_maps(*given)[0]

    plain, plain_bytes = gradients(model, forward), kept_bytes(model, forward)
    model.enable_gradient_checkpointing()
    light, light_bytes = gradients(model, forward), kept_bytes(model, forward)
    assert light_bytes < 0.7 * plain_bytes
    assert plain.keys() == light.keys()
    assert all(torch.allclose(light[name], plain[name], atol=1e-6) for name in plain)
