"""Accuracies that were published for configs: SlowFast's, its projects', and the STTS paper's.

A number is of one file and one dataset, as the table that it is from names them. Configs that no
table names have none, however much they resemble one that has.
"""

from dataclasses import dataclass
from pathlib import Path

from stts_slowfast.configfiles.files import CONFIGS, find_config


@dataclass(frozen=True)
class Published:
    """One published result.

    Attributes:
        top1: in percent.
        source: the table that it is from.
        views: clips and crops of a video, such as (5, 1); None if the table does not state them.
        gflops: multiply-adds of one view, in 1e9, as published; None if the table has none.
    """

    top1: float
    source: str
    views: tuple[int, int] | None = None
    gflops: float | None = None


def _zoo(top1, views=None, gflops=None):
    return Published(top1, "SlowFast, MODEL_ZOO.md", views, gflops)


def _project(name):
    return lambda top1, views, gflops: Published(
        top1, f"SlowFast, projects/{name}/README.md", views, gflops
    )


def _paper(top1, gflops):
    return Published(top1, "STTS, arXiv 2111.11591", None, gflops)


_v2, _rev, _mae, _maskfeat, _ptv = map(
    _project, ("mvitv2", "rev", "mae", "maskfeat", "pytorchvideo")
)

# By the config's path below `configs`, then by TEST.DATASET. Several results differ in views.
TABLE: dict[str, dict[str, tuple[Published, ...]]] = {
    name: {dataset: results}
    for name, dataset, *results in (
        ("Kinetics/c2/C2D_NOPOOL_8x8_R50", "kinetics", _zoo(67.2, (10, 3))),
        ("Kinetics/c2/I3D_8x8_R50", "kinetics", _zoo(73.5, (10, 3))),
        ("Kinetics/c2/I3D_NLN_8x8_R50", "kinetics", _zoo(74.0, (10, 3))),
        ("Kinetics/c2/SLOW_4x16_R50", "kinetics", _zoo(72.7, (10, 3))),
        ("Kinetics/c2/SLOW_8x8_R50", "kinetics", _zoo(74.8, (10, 3))),
        ("Kinetics/c2/SLOWFAST_4x16_R50", "kinetics", _zoo(75.6, (10, 3))),
        ("Kinetics/c2/SLOWFAST_8x8_R50", "kinetics", _zoo(77.0, (10, 3))),
        ("Kinetics/MVIT_B_16x4_CONV", "kinetics", _zoo(78.4, (5, 1))),
        ("Kinetics/MVIT_B_32x3_CONV", "kinetics", _zoo(80.4, (5, 1))),
        ("Kinetics/REV_MVIT_B_16x4_CONV", "kinetics", _rev(78.4, (5, 1), 64)),
        ("Kinetics/MVITv2_S_16x4", "kinetics", _v2(81.0, (5, 1), 64)),
        ("Kinetics/MVITv2_B_32x3", "kinetics", _v2(82.9, (5, 1), 225)),
        ("Kinetics/MVITv2_L_40x3_test", "kinetics", _v2(86.1, (5, 3), 2828)),
        ("Kinetics/X3D_XS", "kinetics", _zoo(69.5, (10, 3)), _zoo(68.7, (10, 1), 0.60)),
        ("Kinetics/X3D_S", "kinetics", _zoo(73.5, (10, 3)), _zoo(73.1, (10, 1), 1.96)),
        ("Kinetics/X3D_M", "kinetics", _zoo(76.2, (10, 3)), _zoo(75.1, (10, 1), 4.73)),
        ("Kinetics/X3D_L", "kinetics", _zoo(77.5, (10, 3)), _zoo(76.9, (10, 1), 18.37)),
        ("Kinetics/SLOWFAST_8x8_R50_stepwise", "kinetics", _zoo(76.8)),
        ("Kinetics/SLOWFAST_8x8_R50_stepwise_multigrid", "kinetics", _zoo(76.6)),
        ("Kinetics/pytorchvideo/C2D_8x8_R50", "ptvkinetics", _ptv(71.46, (10, 3), 25.89)),
        ("Kinetics/pytorchvideo/I3D_8x8_R50", "ptvkinetics", _ptv(73.27, (10, 3), 37.53)),
        ("Kinetics/pytorchvideo/SLOW_4x16_R50", "ptvkinetics", _ptv(72.40, (10, 3), 27.55)),
        ("Kinetics/pytorchvideo/SLOW_8x8_R50", "ptvkinetics", _ptv(74.58, (10, 3), 54.52)),
        ("Kinetics/pytorchvideo/SLOWFAST_4x16_R50", "ptvkinetics", _ptv(75.34, (10, 3), 36.69)),
        ("Kinetics/pytorchvideo/SLOWFAST_8x8_R50", "ptvkinetics", _ptv(76.94, (10, 3), 65.71)),
        ("Kinetics/pytorchvideo/SLOWFAST_8x8_R101", "ptvkinetics", _ptv(77.90, (10, 3), 127.20)),
        (
            *("Kinetics/pytorchvideo/SLOWFAST_16x8_R101_50_50", "ptvkinetics"),
            _ptv(78.70, (10, 3), 215.61),
        ),
        ("Kinetics/pytorchvideo/CSN_32x2_R101", "ptvkinetics", _ptv(77.00, (10, 3), 75.62)),
        ("Kinetics/pytorchvideo/R2PLUS1D_16x4_R50", "ptvkinetics", _ptv(76.01, (10, 3), 76.45)),
        ("Kinetics/pytorchvideo/X3D_XS", "ptvkinetics", _ptv(69.12, (10, 3), 0.91)),
        ("Kinetics/pytorchvideo/X3D_S", "ptvkinetics", _ptv(73.33, (10, 3), 2.96)),
        ("Kinetics/pytorchvideo/X3D_M", "ptvkinetics", _ptv(75.94, (10, 3), 6.72)),
        ("Kinetics/pytorchvideo/X3D_L", "ptvkinetics", _ptv(77.44, (10, 3), 26.64)),
        ("SSv2/MVITv2_S_16x4", "ssv2", _v2(68.2, (1, 3), 64)),
        ("SSv2/MVITv2_B_32x3", "ssv2", _v2(70.5, (1, 3), 225)),
        ("SSv2/MVITv2_L_40x3", "ssv2", _v2(73.3, (1, 3), 2828)),
        ("SSv2/SLOWFAST_16x8_R50", "ssv2", _zoo(63.0)),
        ("SSv2/SLOWFAST_16x8_R50_multigrid", "ssv2", _zoo(63.5)),
        ("SSv2/pytorchvideo/SLOW_8x8_R50", "ptvssv2", _ptv(60.04, (1, 3), 55.10)),
        ("SSv2/pytorchvideo/SLOWFAST_8x8_R50", "ptvssv2", _ptv(61.68, (1, 3), 66.60)),
        ("masked_ssl/k400_VIT_B_16x4_FT", "kinetics", _mae(81.3, (7, 3), 180)),
        ("masked_ssl/k400_VIT_L_16x4_FT", "kinetics", _mae(84.8, (7, 3), 598)),
        ("masked_ssl/k400_VIT_H_16x4_FT", "kinetics", _mae(85.1, (7, 3), 1193)),
        ("masked_ssl/k400_MVITv2_S_16x4_FT", "kinetics", _maskfeat(82.2, (10, 1), 71)),
        ("masked_ssl/k400_MVITv2_L_16x4_FT", "kinetics", _maskfeat(84.3, (10, 1), 377)),
        ("masked_ssl/in1k_VIT_B_MaskFeat_FT", "imagenet", _maskfeat(84.0, None, None)),
        ("masked_ssl/in1k_VIT_L_MaskFeat_FT", "imagenet", _maskfeat(85.7, None, None)),
        ("ImageNet/RES_R50", "imagenet", _zoo(76.4, (1, 1))),
        ("ImageNet/MVIT_B_16_CONV", "imagenet", _zoo(82.9, (1, 1))),
        ("ImageNet/REV_VIT_S", "imagenet", _rev(79.9, (1, 1), 4.6)),
        ("ImageNet/REV_VIT_B", "imagenet", _rev(81.8, (1, 1), 17.6)),
        ("ImageNet/REV_MVIT_B_16_CONV", "imagenet", _rev(82.9, (1, 1), 8.7)),
        ("Kinetics/STTS_MVIT_B_16x4_T0_0.9_S4_0.9", "kinetics", _paper(78.1, 56.4)),
        ("Kinetics/STTS_MVIT_B_16x4_T0_0.8_S4_0.9", "kinetics", _paper(77.9, 47.2)),
        ("Kinetics/STTS_MVIT_B_16x4_T0_0.6_S4_0.9", "kinetics", _paper(77.5, 38.1)),
        ("Kinetics/STTS_MVIT_B_16x4_T0_0.5_S4_0.7", "kinetics", _paper(76.6, 23.3)),
        ("Kinetics/STTS_MVIT_B_16x4_T0_0.4_S4_0.6", "kinetics", _paper(75.6, 12.1)),
        ("Kinetics/STTS_SWIN_B_32x2_T0_0.9", "kinetics", _paper(81.9, 252.5)),
        ("Kinetics/STTS_SWIN_B_32x2_T0_0.8", "kinetics", _paper(81.6, 223.4)),
        ("Kinetics/STTS_SWIN_B_32x2_T0_0.6", "kinetics", _paper(81.4, 181.4)),
        ("Kinetics/STTS_SWIN_B_32x2_T0_0.5", "kinetics", _paper(81.1, 121.6)),
        ("Kinetics/STTS_SWIN_B_32x2_T0_0.4", "kinetics", _paper(80.7, 91.4)),
    )
}


def published(config: str, dataset: str, views: tuple[int, int] | None = None) -> Published | None:
    """What was published for a config file on a dataset; None if nothing was.

    Args:
        config: a file in SlowFast's checkout or one that comes with this package, or its name.
        dataset: ``TEST.DATASET``.
        views: clips and crops; of several results the one with as many is preferred.
    """
    results = TABLE.get(_name(config), {}).get(dataset, ())
    return next((each for each in results if each.views == views), next(iter(results), None))


def _name(config: str) -> str | None:
    """``Kinetics/MVIT_B_16x4_CONV`` of a file in either's ``configs``; None for other files."""
    path = Path(find_config(config)).resolve()
    for folder in path.parents:
        checkout = folder.name == "configs" and (
            folder.parent / "slowfast" / "config" / "defaults.py"
        )
        if folder == CONFIGS.resolve() or (checkout and checkout.is_file()):
            return path.relative_to(folder).with_suffix("").as_posix()
    return None
