"""No setting of a configuration ends in a traceback: ranges, and rules between fields,
are one sentence each.
"""

import dataclasses
import json
import math

import pytest
from tiny_world import one_sentence, tiny_config

from gsv3d_lib.config import (
    NAMES,
    PRESETS,
    RING_VIEWS,
    SCHEDULE_VALUES,
    VALUES,
    Config,
    Numbers,
    Schedule,
    parse_setting,
    preset,
)
from gsv3d_lib.data.dataset import RING
from gsv3d_lib.system.errors import UserError
from gsv3d_lib.weights.checkpoint import load_config

SCHEDULES = {"vae_schedule", "dino_schedule", "diffusion_schedule", "stage1", "stage2"}


def test_every_field_has_its_values():
    assert VALUES.keys() | SCHEDULES == {field.name for field in dataclasses.fields(Config)}
    assert SCHEDULE_VALUES.keys() == {field.name for field in dataclasses.fields(Schedule)}
    assert tuple(PRESETS) == NAMES and RING_VIEWS == RING


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cond_dropout", 7.0),
        ("cond_dropout", math.nan),
        ("sigma_max", math.inf),
        ("stage1.ema", 2.0),
        ("stage1.ema", 1.0),
        ("stage1.warmup", -5),
        ("stage1.lr", math.nan),
        ("stage1.lr", -1e-3),
        ("stage1.steps", 0),
        ("stage1.batch", 70_000),
        ("stage1.micro_batch", -1),
        ("vae_schedule.weight_decay", math.inf),
        ("lora_rank", 0),
        ("copies", 10**6),
        ("seed", -1),
        ("seed", 10**12),
        ("view_counts", ()),
        ("view_counts", (4, "8")),
        ("unet_channels", (64.0, 128.0)),
        ("unet_attention", (1, 0)),
        ("dino", "dinov3"),
        ("sigma_weighting", "sigma"),
        ("lambda_rgb", -1.0),
    ],
)
def test_values_out_of_range_are_one_sentence(name, value):
    with pytest.raises(UserError, match=f"{name.split('.')[-1]} takes ") as error:
        preset("tiny", **{name: value})
    one_sentence(error)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_size": 60}, "image_size is a multiple of 8"),
        ({"image_size": 72}, "image_size / 8 is a multiple of 2"),
        ({"unet_channels": (32, 64, 64)}, "an entry for each level"),
        ({"unet_channels": (64, 72)}, "unet_channels takes multiples of 32"),
        ({"unet_heads": (3, 4)}, "each entry of unet_channels is a multiple of that of unet_heads"),
        ({"vae_channels": (32, 64)}, "vae_channels has 4 entries"),
        ({"vae_channels": (32, 64, 64, 72)}, "vae_channels takes multiples of 32"),
        ({"vae_norm_groups": 5}, "vae_channels takes multiples of 5, vae_norm_groups"),
        ({"clip_heads": 3}, "clip_width takes multiples of 3, clip_heads; got 128"),
        ({"dino_width": 130}, "dino_width takes multiples of 4, dino_heads"),
        ({"decoder_heads": 7}, "decoder_width takes multiples of 7, decoder_heads"),
        ({"clip_patch": 7}, "clip_size takes multiples of 7, clip_patch"),
        (
            {"decoder_patch": 3},
            "image_size / 8 is a multiple of decoder_patch; got image_size = 64, decoder_patch = 3",
        ),
        ({"decoder_upsample": 3}, "8 decoder_patch is a multiple of decoder_upsample"),
        ({"view_counts": (4, 6)}, "view_counts are 1, 2, 4, 8 or 16"),
        ({"sigma_min": 90.0}, "sigma_min is below sigma_max"),
        ({"scale_range": (0.5, 0.1)}, "the smallest and the largest scale"),
        ({"scale_range": (0.1,)}, "the smallest and the largest scale"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        preset("tiny", **changes)
    one_sentence(error)


def test_ends_of_a_range():
    assert (
        0 in Numbers(0, 1)
        and 0 not in Numbers(0, 1, above=True)
        and 1.5 not in Numbers(0, 2, whole=True)
    )
    assert (
        True not in Numbers(0, 1)
        and "1" not in Numbers(0, 1)
        and math.nan not in Numbers(-math.inf, math.inf)
    )
    assert str(Numbers(0, 1, whole=True)) == "whole numbers from 0 to 1"


def test_a_whole_number_may_become_a_fraction_again():
    assert preset("tiny", lambda_3d=2).replace(lambda_3d=0.5).lambda_3d == 0.5


@pytest.mark.parametrize(
    "text", ["(" * 5000, "{[]: 1}", "9" * 5000, "a.b.c=1", "=", "1e999", "nan", "__import__('os')"]
)
def test_no_setting_ends_in_a_traceback(text):
    for setting in (f"seed={text}", f"stage1.lr={text}", text):
        with pytest.raises(UserError) as error:
            preset("tiny", **dict([parse_setting(setting)]))
        assert len(str(error.value)) < 1500 and "\n" not in str(error.value)


def test_a_stored_configuration_out_of_range_names_its_file(tmp_path):
    stored = dataclasses.asdict(tiny_config()) | {"cond_dropout": 7}
    (tmp_path / "gsv3d.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="gsv3d.json cannot be read .*cond_dropout takes"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_shipped_configurations_open(name):
    assert load_config(f"data/checkpoints/{name}").name == name
