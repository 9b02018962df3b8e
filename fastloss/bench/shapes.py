"""Real shapes, by the names people know them by: what the benchmark's preset `real` times and what tests/test_real_shapes.py checks."""

from dataclasses import replace

from .cases import Case

SHAPES = {
    "llama3-8b-sft": Case("cross_entropy", (8192, 128256), "bfloat16"),
    "gpt2-head": Case("linear_cross_entropy", (8192, 768, 50257)),
    "gpt2": Case("cross_entropy", (8192, 50257)),
    "bert-mlm": Case("cross_entropy", (4096, 30522)),
    "distillation": Case("cross_entropy, probabilities", (2048, 32000), "bfloat16"),
    "distillation-top64": Case("sparse_soft_cross_entropy, 64 classes a row", (2048, 32000), "bfloat16"),
    "grpo": Case("token_statistics", (2048, 151936), "bfloat16"),
    "imagenet": Case("cross_entropy, smoothed and weighted", (256, 1000)),
    "imagenet-mixup": Case("cross_entropy, probabilities", (256, 1000)),
    "imagenet-cutmix": Case("sparse_soft_cross_entropy, 2 classes a row", (256, 1000)),
    "cifar": Case("cross_entropy", (512, 10)),
    "deeplab-voc": Case("cross_entropy", (8, 21, 512, 512)),
    "imagenet-weighted-amp": Case("cross_entropy, weighted under autocast", (256, 1000), "bfloat16"),
    "openimages-multilabel-amp": Case("binary_cross_entropy_with_logits, float32 labels under autocast", (256, 9605), "bfloat16"),
    "coco-multilabel": Case("binary_cross_entropy_with_logits, pos_weight", (256, 80)),
    "xmc": Case("binary_cross_entropy_with_logits", (4096, 32000)),
    "mask-head": Case("binary_cross_entropy_with_logits", (16, 1, 1024, 1024)),
    "retinanet": Case("sigmoid_focal_loss", (8, 120087, 80)),
    "attention": Case("softmax", (12 * 1024, 1024)),
    "speech-ctc": Case("log_softmax", (16 * 1500, 32)),
}


def few_rows(case: Case, logits: int) -> Case:
    """The same classes and positions' layout with at most about so many logits."""
    batch, classes, *positions = case.shape
    if case.spec.linear:
        return replace(case, shape=(max(2, min(batch, logits // case.shape[2])), *case.shape[1:]))
    if positions:
        side = max(1, int((logits / classes) ** 0.5))
        return replace(case, shape=(1, classes, *(min(p, side) for p in positions)))
    return replace(case, shape=(max(2, min(batch, logits // classes)), classes))
