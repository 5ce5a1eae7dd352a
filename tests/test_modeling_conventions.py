# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What Transformers expects of its models, on every class: saving, loading, placement, recomputation, the Trainer."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from model_inputs import tiny_batch, tiny_config, tiny_contrast_config, tiny_vit_config
from safetensors.torch import load_file
from tiny_checkpoint import tiny_processor
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_t3d.modeling_pretraining_t3d import T3DForPreTraining
from modeling_t3d.modeling_t3d import T3DForImageClassification, T3DModel, T3DVisionModel

CLASSES = [T3DVisionModel, T3DModel, T3DForPreTraining, T3DForImageClassification]
VISION_CLASSES = [T3DVisionModel, T3DForImageClassification]

# Every parameter that some choice adds.
DUAL_CONFIGS = {
    "resnet": lambda: tiny_config(view_fusion="attention", contrastive_loss="sigmoid", tma_query="none"),
    "batch norm": lambda: tiny_config(vision_config={"norm": "batch"}, projection_norm="batch"),
    "vit": lambda: tiny_vit_config(learnable_temperature=True, tma_query="vision", tma_loss="swav", num_prototypes=8),
    "local contrast": tiny_contrast_config,
}


def build(model_class, kind: str, **overrides):
    """A model of any class, the dual configuration cut down to the vision tower for those that take it."""
    config = DUAL_CONFIGS[kind]()
    if model_class in VISION_CLASSES:
        config = config.vision_config
        config.num_labels = 3
    for name, value in overrides.items():
        setattr(config, name, value)
    return model_class(config)


def inputs_of(model_class) -> dict:
    batch = tiny_batch(4)
    return {"pixel_values": batch["pixel_values"]} if model_class in VISION_CLASSES else batch


def main_output(output) -> torch.Tensor:
    return next(
        getattr(output, name) for name in ("logits", "logits_per_image", "last_hidden_state") if hasattr(output, name)
    )


def scramble(model: nn.Module) -> nn.Module:
    """Weights, statistics and counters that no initialisation would give."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            tensor.fill_(7)
        else:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - (0.0 if "running_var" in name else 0.5))
    return model.eval()


both = pytest.mark.parametrize("model_class", CLASSES)
every_kind = pytest.mark.parametrize("kind", DUAL_CONFIGS)


# --- saving and loading ----------------------------------------------------------------------------------------------


@both
@every_kind
def test_save_and_load_are_bit_exact(tmp_path, model_class, kind):
    model = scramble(build(model_class, kind))
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(tmp_path.glob("*.bin"))
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        outputs = [main_output(one(**inputs_of(model_class))) for one in (model, loaded)]
    assert torch.equal(*outputs)


def parts_of(model_class) -> set[str]:
    """First path components, below the prefix of a head, of what a class holds beyond the vision tower."""
    return {
        T3DVisionModel: set(),
        T3DForImageClassification: {"classifier"},
        T3DModel: {"text_model", "visual_projection", "text_projection", "view_fusion", "logit_scale", "logit_bias"},
        T3DForPreTraining: {
            "text_model",
            "visual_projection",
            "text_projection",
            "view_fusion",
            "logit_scale",
            "logit_bias",
            "multi_view_alignment",
            "prototypes",
        },
    }[model_class]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *((source, target) for source in CLASSES for target in VISION_CLASSES if source is not target),
        (T3DModel, T3DForPreTraining),
        (T3DForPreTraining, T3DModel),
    ],
)
@every_kind
def test_folders_load_into_each_other(tmp_path, source, target, kind):
    model = scramble(build(source, kind))
    model.save_pretrained(tmp_path / "source")
    settings = {"num_labels": 3} if target is T3DForImageClassification else {}
    loaded, report = target.from_pretrained(tmp_path / "source", output_loading_info=True, **settings)

    def parts(keys) -> set[str]:
        return {key.removeprefix("t3d.").split(".")[0] for key in keys}

    assert parts(report["missing_keys"]) <= parts_of(target) - parts_of(source)
    assert parts(report["unexpected_keys"]) <= parts_of(source) - parts_of(target)
    assert not report["mismatched_keys"]
    if target is T3DModel and source is T3DForPreTraining:
        assert not report["unexpected_keys"], "the dual encoder loads from where pre-training ended without a warning"
    assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())

    def plain(state: dict) -> dict:
        """Keys as a dual encoder would have them."""
        return {
            f"vision_model.{key}" if key.startswith("encoder.") else key.removeprefix("t3d."): value
            for key, value in state.items()
        }

    ours, theirs = plain(loaded.state_dict()), plain(model.state_dict())
    shared = ours.keys() & theirs.keys()
    assert any(key.startswith("vision_model.encoder.") for key in shared)
    assert {key.split(".")[0] for key in ours.keys() - shared} <= parts_of(target) - parts_of(source)
    for key in shared:
        assert torch.equal(ours[key], theirs[key]), key
    # What is saved next carries this class's own names, whatever folder it came from.
    loaded.save_pretrained(tmp_path / "target")
    assert load_file(tmp_path / "target" / "model.safetensors").keys() == loaded.state_dict().keys()
    again, report = target.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(again.state_dict(), loaded.state_dict(), rtol=0, atol=0)


@both
@every_kind
def test_what_a_checkpoint_lacks_is_initialised_as_in_a_new_model(model_class, kind):
    fresh = build(model_class, kind)
    loaded = model_class.from_pretrained(None, config=copy.deepcopy(fresh.config), state_dict={})
    for name, tensor in fresh.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.shape == tensor.shape
        if tensor.numel() == 1 or (tensor == tensor.flatten()[0]).all():
            assert torch.equal(other, tensor), name
        elif tensor.numel() >= 64:
            assert 0.6 < other.std() / tensor.std() < 1.7, name
            assert other.mean().abs() < other.std(), name


def test_missing_tensors_leave_loaded_ones_of_the_same_module_alone(tmp_path):
    model = scramble(build(T3DForPreTraining, "resnet"))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("bias")}
    loaded = T3DForPreTraining.from_pretrained(None, config=model.config, state_dict=state)
    for name, tensor in state.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.t3d.logit_bias.item() == -10.0


def test_a_classifier_of_other_size_starts_anew_when_asked(tmp_path):
    build(T3DForImageClassification, "resnet").save_pretrained(tmp_path)
    loaded = T3DForImageClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert loaded.classifier.weight.shape[0] == 5


def test_models_are_built_on_the_meta_device_in_a_fresh_process():
    code = """
import torch
from model_inputs import tiny_config, tiny_vit_config
from modeling_t3d import T3DForImageClassification, T3DForPreTraining, T3DModel, T3DVisionModel
for config in (tiny_config(view_fusion="attention", tma_query="none"), tiny_vit_config(contrastive_loss="sigmoid")):
    for model_class in (T3DForPreTraining, T3DModel, T3DVisionModel, T3DForImageClassification):
        own = config if model_class in (T3DForPreTraining, T3DModel) else config.vision_config
        with torch.device("meta"):
            model = model_class(own)
        tensors = [*model.parameters(), *model.buffers()]
        assert tensors and all(tensor.is_meta for tensor in tensors)
print("all on meta")
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert process.stdout.strip() == "all on meta", process.stderr


# --- precision and placement -----------------------------------------------------------------------------------------


@both
@every_kind
def test_bfloat16_loads_and_takes_the_processors_float32(tmp_path, model_class, kind):
    model = build(model_class, kind).eval()
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    in_float32 = {"logit_scale", "logit_bias"}
    for name, parameter in loaded.named_parameters():
        expected = torch.float32 if name.split(".")[-1] in in_float32 else torch.bfloat16
        assert parameter.dtype == expected, name
    inputs = inputs_of(model_class)
    with torch.no_grad():
        expected, output = main_output(model(**inputs)), main_output(loaded(**inputs))
    assert (output.float() - expected).abs().max() < 0.1 * expected.abs().max()


@both
@every_kind
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_offloading_to_disk_gives_the_same_outputs(tmp_path, model_class, kind, share):
    model = scramble(build(model_class, kind))
    model.save_pretrained(tmp_path / "model")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    loaded = model_class.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(share * size)},
        offload_folder=tmp_path / "offloaded",
    ).eval()
    assert any(parameter.is_meta for parameter in loaded.parameters())
    with torch.no_grad():
        outputs = [one(**inputs_of(model_class)) for one in (model, loaded)]
    assert torch.equal(*map(main_output, outputs))
    if model_class is T3DForPreTraining:
        assert torch.equal(outputs[0].loss, outputs[1].loss)


# --- forward ---------------------------------------------------------------------------------------------------------


@both
def test_the_main_input_comes_first(model_class):
    assert list(inspect.signature(model_class.forward).parameters)[1] == model_class.main_input_name


@both
@every_kind
def test_evaluation_is_deterministic_and_tuples_hold_the_same(model_class, kind):
    model = build(model_class, kind).eval()
    inputs = inputs_of(model_class)
    with torch.no_grad():
        first, second, as_tuple = model(**inputs), model(**inputs), model(**inputs, return_dict=False)
    assert torch.equal(main_output(first), main_output(second))
    assert isinstance(as_tuple, tuple)
    assert any(torch.equal(main_output(first), item) for item in as_tuple if isinstance(item, torch.Tensor))


@pytest.mark.parametrize("kind", ["resnet", "vit", "local contrast"])
@pytest.mark.parametrize("model_class", VISION_CLASSES)
def test_hidden_states_are_one_more_than_the_layers(model_class, kind):
    model = build(model_class, kind)
    inputs = inputs_of(model_class)
    output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert model(**inputs).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model.vision_model(**inputs).hidden_states if hasattr(model, "vision_model") else output.hidden_states)
    # Gradients can be kept on what is put out, but for responses of filters that never change.
    learnt = output.hidden_states[kind == "local contrast" :]
    for hidden_state in learnt:
        hidden_state.retain_grad()
    main_output(output).sum().backward()
    assert all(hidden_state.grad is not None for hidden_state in learnt)


@pytest.mark.parametrize("kind", ["resnet", "vit", "local contrast"])
def test_both_towers_put_out_hidden_states(kind):
    model = build(T3DModel, kind)
    output = model(**inputs_of(T3DModel), output_hidden_states=True)
    assert len(output.vision_model_output.hidden_states) == model.config.vision_config.num_hidden_layers + 1
    assert len(output.text_model_output.hidden_states) == model.config.text_config.num_hidden_layers + 1


@both
@every_kind
def test_attention_implementations_agree(tmp_path, model_class, kind):
    scramble(build(model_class, kind)).save_pretrained(tmp_path)
    inputs = inputs_of(model_class)
    outputs = {}
    for implementation in ("eager", "sdpa"):
        model = model_class.from_pretrained(tmp_path, attn_implementation=implementation).eval()
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            outputs[implementation] = main_output(model(**inputs))
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], rtol=1e-4, atol=1e-4)


def test_eager_attention_puts_out_its_maps():
    model = build(T3DVisionModel, "vit")
    model.set_attn_implementation("eager")
    attentions = model(**inputs_of(T3DVisionModel), output_attentions=True).attentions
    assert [tuple(attention.shape) for attention in attentions] == [(4, 2, 32, 32)] * 2
    torch.testing.assert_close(attentions[0].sum(dim=-1), torch.ones(4, 2, 32))


@pytest.mark.parametrize(
    ("kind", "training"), [("batch norm", True), ("vit", True), ("vit", False), ("local contrast", True)]
)
def test_the_vision_tower_compiles_as_one_graph(kind, training):
    torch._dynamo.reset()
    model = build(T3DVisionModel, kind).train(training)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    for batch_size in (1, 3, 2):
        views = torch.randn(batch_size, 1, 8, 16, 16)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(compiled(views).pooler_output, twin(views).pooler_output, rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 2


# --- activation checkpointing ----------------------------------------------------------------------------------------


@both
@every_kind
def test_checkpointing_keeps_gradients_and_running_statistics(model_class, kind):
    overrides = {"classifier_dropout": 0.0} if model_class is T3DForImageClassification else {}
    plain = build(model_class, kind, **overrides).train()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    recomputed = copy.deepcopy(plain)
    recomputed.activation_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in recomputed.modules())
    runs = []
    for module in recomputed.modules():
        if type(module).__name__ in ("T3DResNetBasicBlock", "T3DViTLayer", "T3DPlaceProjection"):
            module.register_forward_hook(lambda *_: runs.append(1))
    for model in (plain, recomputed):
        output = model(**inputs_of(model_class))
        (output.loss if model_class is T3DForPreTraining else main_output(output).square().sum()).backward()
    assert runs
    for (name, expected), parameter in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert (expected.grad is None) == (parameter.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(dict(recomputed.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [T3DModel, T3DForPreTraining])
def test_the_vocabulary_can_grow(tmp_path, model_class):
    model = build(model_class, "resnet")
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(120)
    assert model.config.text_config.vocab_size == 120
    assert torch.equal(model.get_input_embeddings().weight[:99], old)
    batch = inputs_of(model_class)
    batch["input_ids"][0, 1] = 119
    assert main_output(model.eval()(**batch)).isfinite().all()
    model.save_pretrained(tmp_path)
    assert model_class.from_pretrained(tmp_path).get_input_embeddings().weight.shape[0] == 120


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_input_layer_of_each_class(kind):
    for model_class in VISION_CLASSES:
        layer = build(model_class, kind).get_input_embeddings()
        assert isinstance(layer, nn.Conv3d if kind == "resnet" else nn.Linear)
    model = build(T3DModel, kind)
    replacement = nn.Embedding(50, 16)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is replacement


# --- the Trainer -----------------------------------------------------------------------------------------------------


# Local contrast holds a batch norm, which sees a micro-batch alone.
@pytest.mark.parametrize(
    ("kind", "accumulation"), [("resnet", 1), ("resnet", 2), ("vit", 1), ("vit", 2), ("local contrast", 1)]
)
@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_the_trainers_first_step_is_that_of_the_whole_batch(tmp_path, problem_type, kind, accumulation):
    model = build(T3DForImageClassification, kind, problem_type=problem_type, classifier_dropout=0.0).train()
    views = torch.randn(4, 1, 8, 16, 16)
    labels = torch.tensor([0, 2, 1, 1])
    if problem_type != "single_label_classification":
        labels = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1]])
    reference = copy.deepcopy(model)
    reference(views, labels=labels).loss.backward()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"pixel_values": view, "labels": label} for view, label in zip(views, labels, strict=True)]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Trainer(model=model, args=arguments, train_dataset=data).train()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert (before[name] - parameter - gradients[name]).abs().max() <= 1e-5 * max(largest, 1), name


def test_what_a_trainer_with_a_processor_saves_loads_again(tmp_path):
    processor = tiny_processor()
    processor.tokenizer.bos_token = processor.tokenizer.cls_token
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True)
    data = [{"pixel_values": torch.randn(1, 8, 16, 16), "labels": label} for label in (0, 1)]
    model = build(T3DForImageClassification, "resnet")
    trainer = Trainer(model=model, args=arguments, train_dataset=data, processing_class=processor)
    trainer.train()
    trainer.save_model()
    loaded = T3DForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.pad_token_id == processor.tokenizer.pad_token_id
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_the_trainer_pre_trains_and_evaluates(tmp_path):
    model = build(T3DForPreTraining, "resnet")
    batch = tiny_batch(8)
    data = [{name: value[index] for name, value in batch.items()} for index in range(8)]
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert trainer.evaluate()["eval_loss"] > 0
