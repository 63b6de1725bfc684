"""Applications of the Pollux evaluation (OSDI 2021), as parametric models.

The numbers were read off the tables published with its simulator (github.com/petuum/adaptdl, branch osdi21-artifact,
folder simulator/traces): step times of placements on nodes of four T4 GPUs, gradient statistics per epoch, and the
tuned requests of its workloads. They are rounded fits of those tables, not the tables: load the originals with
`policies.simulator.tables` where the difference matters. Nothing here was measured by this project.
"""

from __future__ import annotations

from orchestrator.policies.simulator.application import Application, NoiseCurve
from orchestrator.policies.simulator.response import Parametric

_CIFAR10 = Application(
    name="cifar10",  # ResNet-18
    base_batch=128,
    max_batch=4096,
    min_micro_batch=32,
    max_micro_batch=1024,
    max_workers=64,
    num_samples=39_070 * 128.0,
    noise=NoiseCurve(
        ends=(0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.14, 0.2, 0.27, 0.34, 0.4, 0.46, 0.51, 0.57, 0.61, 0.7, 1.0),
        scales=tuple(
            128.0 * ratio
            for ratio in (0.51, 3.45, 4.5, 6.4, 9.5, 15, 21, 24, 33, 48, 62, 78, 99, 118, 180, 240, 460, 800)
        ),
    ),
    response=Parametric(
        alpha_c=0.0215, beta_c=0.000662, alpha_r=0.035, beta_r=0.002, alpha_n=0.115, beta_n=0.0026, gamma=3.0
    ),
    requests=((6, 2048), (8, 2048), (12, 4096), (16, 4096)),
)

_NCF = Application(
    name="ncf",  # NeuMF; one replica and one batch in that evaluation
    base_batch=32_768,
    max_batch=32_768,
    min_micro_batch=32_768,
    max_micro_batch=32_768,
    max_workers=1,
    num_samples=194_177 * 256.0,
    noise=NoiseCurve(ends=(1.0,), scales=(700_000.0,)),
    response=Parametric(alpha_c=0.004, beta_c=8.8e-7),
    requests=((1, 32_768),),
)

_DEEPSPEECH2 = Application(
    name="deepspeech2",
    base_batch=20,
    max_batch=640,
    min_micro_batch=10,
    max_micro_batch=80,
    max_workers=64,
    num_samples=28_538 * 20.0,
    noise=NoiseCurve(
        ends=(
            0.0125, 0.025, 0.0375, 0.05, 0.0625, 0.075, 0.0875, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.3, 0.35,
            0.4, 0.45, 1.0,
        ),
        scales=tuple(
            20.0 * ratio
            for ratio in (0.66, 2.5, 6.5, 10.7, 16.6, 21.6, 27, 33, 44, 52, 72, 92, 118, 170, 270, 430, 580, 800, 1400)
        ),
    ),
    response=Parametric(
        alpha_c=0.24, beta_c=0.0225, alpha_r=0.3, beta_r=0.09, alpha_n=0.58, beta_n=0.026, gamma=2.0
    ),
    requests=((6, 320), (8, 320), (12, 640)),
)  # fmt: skip

_BERT = Application(
    name="bert",  # fine-tuning on SQuAD
    base_batch=12,
    max_batch=384,
    min_micro_batch=4,
    max_micro_batch=12,
    max_workers=64,
    num_samples=14_774 * 12.0,
    noise=NoiseCurve(ends=(0.5, 1.0), scales=(180 * 12.0, 1000 * 12.0)),
    response=Parametric(alpha_c=0.225, beta_c=0.058, alpha_r=0.13, beta_r=0.07, alpha_n=1.1, beta_n=0.033, gamma=2.0),
    requests=((6, 384), (8, 384), (12, 384), (16, 384)),
)

_YOLOV3 = Application(
    name="yolov3",
    base_batch=8,
    max_batch=512,
    min_micro_batch=4,
    max_micro_batch=8,
    max_workers=64,
    num_samples=103_444 * 8.0,
    noise=NoiseCurve(
        ends=(
            0.02, 0.04, 0.08, 0.1, 0.16, 0.24, 0.32, 0.4, 0.52, 0.6, 0.7, 0.78, 0.82, 0.86, 0.9, 0.94, 1.0,
        ),
        scales=tuple(
            8.0 * ratio for ratio in (0.08, 18, 25, 33, 43, 43, 56, 57, 63, 75, 95, 130, 175, 205, 290, 480, 1000)
        ),
    ),
    response=Parametric(
        alpha_c=0.205, beta_c=0.0152, alpha_r=0.146, beta_r=0.115, alpha_n=0.64, beta_n=0.034, gamma=2.0
    ),
    requests=((4, 64),),
)  # fmt: skip

_IMAGENET = Application(
    name="imagenet",  # ResNet-50
    base_batch=200,
    max_batch=12_800,
    min_micro_batch=20,
    max_micro_batch=200,
    max_workers=64,
    num_samples=576_526 * 200.0,
    noise=NoiseCurve(
        ends=tuple(epoch / 90 for epoch in (1, 2, 3, 4, 8, 14, 30, 45, 60, 90)),
        scales=tuple(200.0 * ratio for ratio in (3.8, 10.5, 18.8, 24, 33, 38, 41, 120, 100, 220)),
    ),
    response=Parametric(alpha_c=0.065, beta_c=0.00435, alpha_r=0.1, beta_r=0.005, alpha_n=0.3, beta_n=0.005, gamma=3.0),
    requests=((24, 3200), (32, 6400)),
)

POLLUX_APPLICATIONS: dict[str, Application] = {
    application.name: application for application in (_CIFAR10, _NCF, _DEEPSPEECH2, _BERT, _YOLOV3, _IMAGENET)
}
