"""Models as the users of training frameworks hold them: `make ecosystem`."""

import warnings

import lightning
import torch
import torch.nn.functional as F
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fxshap
from tests.helpers import additivity_error, explain

X = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.hidden(x)))


def assert_additive(explainable: nn.Module, background: Tensor, samples: Tensor) -> None:
    values = explain(explainable, [background], [samples])
    assert additivity_error(explainable, [background], [samples], values) <= 1e-5


def test_skorch():
    net = NeuralNetClassifier(Net, criterion=nn.CrossEntropyLoss, max_epochs=2, verbose=0)
    net.fit(X, Y)
    explainable = fxshap.make_explainable(net.module_)
    assert_additive(explainable, X[:20], X[20:23])


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def test_lightning(tmp_path):
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=16))
    explainable = fxshap.make_explainable(module)
    assert_additive(explainable, X[:20], X[20:23])
    assert_additive(fxshap.make_explainable(module.net), X[:20], X[20:23])


def test_hugging_face_trainer(tmp_path):
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12, num_labels=3,
    )  # fmt: skip
    ids = torch.randint(5, 30, (16, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    ids[mask == 0] = 0
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": int(i[0]) % 3}
        for i, m in zip(ids, mask, strict=True)
    ]
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=1, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(BertForSequenceClassification(config), arguments, train_dataset=rows)
    trainer.train()

    explainable = fxshap.make_explainable(trainer.model, output="logits")
    embed, suffix = explainable.split_at("bert.embeddings")
    for i in range(2):
        one = {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
        masked = {**one, "input_ids": torch.full_like(one["input_ids"], 3)}
        assert_additive(suffix.bind(**one), embed(**masked), embed(**one))

    words = trainer.model.get_input_embeddings().requires_grad_(False)
    explainable = fxshap.make_explainable(
        trainer.model,
        input_names="inputs_embeds",
        output="logits",
        forward_kwargs={"attention_mask": mask[:1]},
    )
    assert_additive(explainable, words(ids[1:5]), words(ids[:1]))
