"""Every kind of classifier is trained, planned, and stays what it is; pruned ones as well."""

import pytest
import torch
from compress.compressors.activations import activation_bytes
from compress.compressors.pruning.cutting import cut
from compress.compressors.pruning.graph import find_groups
from compress.compressors.pruning.groups import Selection
from compress.compressors.recovery.classification import Classification, Teacher
from compress.compressors.recovery.finetune import Finetune
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef

CLASSES = {
    "ViTForImageClassification": {},
    "DeiTForImageClassificationWithTeacher": {},
    "ConvNextForImageClassification": {"drop_path_rate": 0.2},
    "SwinForImageClassification": {"drop_path_rate": 0.2},
}


@pytest.fixture
def opened(tmp_path):
    """Return `opened(class_name)`: a random tiny classifier of 3 classes for 16 x 16 pixels."""

    def make(class_name):
        import transformers

        encoder = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
                   "intermediate_size": 32}  # fmt: skip
        sizes = {
            "ConvNext": {"hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 1, 1], "patch_size": 1},
            "Swin": {
                "patch_size": 2,
                "embed_dim": 8,
                "depths": [2, 2],
                "num_heads": [1, 2],
                "window_size": 4,
            },
        }.get(class_name.removesuffix("ForImageClassification"), encoder)  # fmt: skip
        kind = getattr(transformers, class_name)
        config = kind.config_class(num_labels=3, image_size=16, **sizes, **CLASSES[class_name])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            kind(config).save_pretrained(tmp_path / class_name)
        return open_model(ModelRef(id=str(tmp_path / class_name)), progress=SilentProgress())

    return make


def _half(model):
    """Cut every second channel inside the feed-forward networks."""
    groups = [group for group in find_groups(model) if group.kind == "ff"]
    kept = {group.name: tuple(range(0, group.size, 2)) for group in groups}
    cut(
        model,
        groups,
        Selection(kept, {}, {group.name: group.size for group in groups}),
        attn_scale="preserve",
    )


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_pruned_classifier_is_trained_and_stays_pruned(
    class_name, opened, images, settings, trained, tmp_path
):
    model, original, data = opened(class_name), opened(class_name), images(size=16)
    _half(model)
    surgery, before = dict(model.surgery), {k: v.clone() for k, v in model.module.state_dict().items()}
    assert surgery
    given = settings(steps=12, lr=3e-3, distill={"weight": 0.5}, mixup=0.2, augment=["flip", "shift"])
    runs = []
    for folder in ("one", "other"):
        model.module.load_state_dict(before)
        learning = Classification(model.module, given, data, Teacher(original.module, given), seed=0)
        result = trained(learning, tmp_path / folder, given)
        runs.append({name: item.clone() for name, item in model.module.state_dict().items()})
    assert result.losses[-1] < result.losses[0]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in before)
    changed = [name for name in before if not torch.equal(runs[0][name], before[name])]
    assert len(changed) > 0.8 * len(list(model.module.parameters()))
    assert model.surgery == surgery
    assert {name: item.shape for name, item in runs[0].items()} == {k: v.shape for k, v in before.items()}


def _activations(spec):
    return activation_bytes(spec.meta_module(), spec.family)


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_pruned_classifier_is_planned(class_name, opened, settings):
    model = opened(class_name)
    dense = model.dense()
    _half(model)
    plan = Finetune().plan(model.dense(), settings(distill={}))
    assert plan.after == plan.before
    assert 0 < _activations(model.dense()) < _activations(dense)
    assert plan.peak_memory_bytes < Finetune().plan(dense, settings(distill={})).peak_memory_bytes
