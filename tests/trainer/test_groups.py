import pytest
import torch
from torch import nn

from common.codec import MAX_BODY_BYTES, encode
from common.messages import GroupSpec, RunStarted
from tests.trainer.small_job import SmallNet
from trainer_node.groups import MAX_TOLD_TENSORS, parameter_groups, told_groups


def named(*names):
    """A model whose parameters have exactly these names."""
    root = nn.Module()
    for name in names:
        module, *_, leaf = root, *name.split(".")
        for part in name.split(".")[:-1]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, nn.Parameter(torch.zeros(2)))
    return root


def kind_of(name):
    (group,) = parameter_groups(named(name))
    return group.name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embedding.weight", "embedding"),
        ("wte.weight", "embedding"),
        ("blocks.0.attention.query.weight", "attention"),
        ("h.0.attn.c_attn.weight", "attention"),
        ("blocks.0.attention_norm.weight", "norm"),
        ("h.0.ln_1.weight", "norm"),
        ("bn1.weight", "norm"),
        ("blocks.0.mlp.up.weight", "mlp"),
        ("fc1.weight", "mlp"),
        ("lm_head.weight", "head"),
        ("head.bias", "head"),
        ("conv_first.weight", "conv"),
        ("gate.weight", "other"),
    ],
)
def test_a_name_tells_the_module_kind(name, kind):
    assert kind_of(name) == kind


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = SmallNet()
    placed = [p for group in parameter_groups(model) for p in group.parameters]
    assert len(placed) == len(set(placed)) == len(list(model.parameters()))


def test_groups_come_in_order_of_first_appearance_and_name_their_depth_third():
    assert [group.name for group in parameter_groups(SmallNet())] == [
        "embedding",
        *(f"{kind}.{third}" for third in ("early", "middle", "late") for kind in ("norm", "mlp")),
        "head",
    ]


def test_depth_thirds_split_seven_blocks_as_evenly_as_possible():
    groups = parameter_groups(named(*(f"blocks.{i}.mlp.weight" for i in range(7))))
    assert {g.name: len(g.parameters) for g in groups} == {"mlp.early": 3, "mlp.middle": 2, "mlp.late": 2}


def test_fewer_than_three_blocks_are_not_split_by_depth():
    groups = parameter_groups(named("blocks.0.mlp.weight", "blocks.1.mlp.weight"))
    assert [group.name for group in groups] == ["mlp"]


def test_frozen_parameters_belong_to_no_group():
    model = SmallNet()
    model.embedding.weight.requires_grad_(False)
    names = [name for group in parameter_groups(model) for name in group.parameter_names]
    assert "embedding.weight" not in names
    assert len(names) == len(list(model.parameters())) - 1


def test_tied_parameters_appear_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 8), "head": nn.Linear(8, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    groups = parameter_groups(model)
    assert [(g.name, g.parameter_names) for g in groups] == [("embedding", ("embedding.weight",))]


def test_the_spec_gives_names_shapes_and_dtypes():
    (spec,) = [g.spec() for g in parameter_groups(SmallNet().to(torch.bfloat16)) if g.name == "head"]
    assert [(p.name, p.shape, p.dtype) for p in spec.parameters] == [
        ("head.weight", (5, 8), "bfloat16"),
        ("head.bias", (5,), "bfloat16"),
    ]


def test_a_model_of_very_many_tensors_is_told_in_short_and_still_whole():
    def told(count):
        groups = parameter_groups(
            named(*(f"layer_with_a_long_name_{i}.attention.query.weight" for i in range(count)))
        )
        return [spec for group in told_groups(groups) for spec in group.parameters]

    few, many = told(MAX_TOLD_TENSORS), told(MAX_TOLD_TENSORS + 1)
    assert len(few) == MAX_TOLD_TENSORS
    assert [(spec.shape, spec.dtype) for spec in many] == [((2 * (MAX_TOLD_TENSORS + 1),), "float32")]
    started = RunStarted(
        run_id="r",
        generation=1,
        resumed_from="",
        settings_toml="x" * 20_000,
        feature_version=1,
        directions=(),
        groups=(GroupSpec(name="attention", parameters=tuple(few)),),
        first_step=0,
    )
    assert len(encode(started)) < MAX_BODY_BYTES
