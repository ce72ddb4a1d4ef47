"""GSV3D: one image in, 3D Gaussians out (arXiv 2503.06136), built to be read.

    from gsv3d_lib import GSV3DPipeline, render

    pipe = GSV3DPipeline.from_pretrained("data/checkpoints/small")
    gaussians = pipe("mug.png")

The paper's chain stands flat, in the order in which the course builds it:

    cameras.py                conventions, orbits, rays
    rotations.py              quaternions and matrices
    gaussians.py              the scene: five tensors
    ply.py                    the file that splat viewers open
    images.py                 any picture -> the condition image
    config.py                 every number, in three presets
    vae.py                    images <-> latents
    encoders.py               CLIP and DINO, and SV3D's condition from them
    attention.py              the one door to attention
    unet.py                   SV3D's multi-view U-Net
    lora.py                   low-rank layers on its attention
    diffusion.py              EDM: noise, loss L_2D, guidance, sampler
    decoder.py                the Gaussian Splatting Decoder
    losses.py                 L_3D, one function per term
    training.py               the loop that all stages share
    pretraining.py            VAE, DINO, diffusion: the paper takes them pretrained
    stage1.py                 stage 1: the decoder learns from true latents
    distillation.py           stage 2: the LoRA learns from rendered RGB and depth
    stages.py                 the table of the five stages
    train.py                  the command that trains them
    backprojection.py         the input's own outline and colours (ours)
    pipeline.py               one image -> 3D Gaussians

What is not the paper lies in wings:

    rendering/__init__.py       `render`, the one door to the rasterisers
    rendering/plain.py          a rasteriser in plain PyTorch, to read
    rendering/rasterizer.py     the fast one for the CPU
    rendering/kernels.py        its numba kernels
    rendering/constants.py      the numbers that all rasterisers share

    export/__init__.py          an object's files: PLY, mesh, video, page
    export/page.py              the viewer: one page, one object or many
    export/gallery.py           the command that writes a page for many
    export/mesh.py              TSDF fusion into a mesh

    data/dataset.py             objects on disk: views, depth, cameras
    data/examples.py            what one training example is
    data/make_dataset.py        renders objects into a dataset
    data/sources.py             where objects come from: rules, folders, Objaverse
    data/raycast.py             meshes -> views by ray casting
    data/elevation.py           how high the camera of a picture stood (ours)
    data/meshfiles.py           mesh files of others, checked
    data/cutout.py              which pixels of a picture are the object
    data/procedural/objects.py  families of objects made by rules
    data/procedural/shapes.py   their shapes
    data/procedural/textures.py their textures

    weights/checkpoint.py       the checkpoint folder: read, write
    weights/run_folder.py       the folder of a training: resume, metrics
    weights/sv3d.py             SV3D's published weights
    weights/sv3d_names.py       their names and ours

    evaluation/protocol.py      what is measured, on which views
    evaluation/metrics.py       PSNR, SSIM, Chamfer distance, F-score, IoU
    evaluation/lpips.py         LPIPS
    evaluation/consistency.py   do the views agree: ghosting, reprojection
    evaluation/baselines.py     a flat card, and the average object
    evaluation/report.py        tables and contact sheets
    evaluation/evaluate.py      the command that measures a checkpoint
    evaluation/experiments.py   what the trained claims of the paper say

    cluster/plan.py             memory and time before a training starts
    cluster/job.py              a training's command, and what would fail
    cluster/launch.py           start one from a notebook and watch it
    cluster/shards.py           training data that streams from disk

    course/figures.py           figures of the notebooks
    course/widgets.py           explorers and viewers
    course/frames.py            an explorer without a kernel: frames drawn beforehand
    course/parameters.py        parameters of notebooks, checked
    course/notebook.py          a notebook through papermill, with a record
    course/run.py               the command that runs one with other parameters
    course/demo.py              the command behind `make demo`

    system/errors.py            what a user can mend, told apart from our bugs
    system/paths.py             where things lie, and how they are written
    system/files.py             files of others, read within bounds
    system/arguments.py         numbers that a user gives, checked
    system/command.py           the manner of all commands
    system/process.py           one training in a folder; how it is stopped
    system/provenance.py        commit, machine and versions of a result
    system/doctor.py            what this machine has

Imports run downward only. The names below are imported when first used: `import
gsv3d_lib` itself takes no time and does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cameras import Cameras
    from .config import preset
    from .gaussians import Gaussians
    from .pipeline import GSV3DPipeline
    from .rendering import render

__version__ = "0.1.0"
__all__ = ["Cameras", "GSV3DPipeline", "Gaussians", "preset", "render"]

_HOMES = {
    "Cameras": "cameras",
    "GSV3DPipeline": "pipeline",
    "Gaussians": "gaussians",
    "preset": "config",
    "render": "rendering",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(
            f"gsv3d_lib has no {name!r}; it offers {', '.join(__all__)}, and its modules."
        )
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
