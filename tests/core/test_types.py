"""What the protocols tell apart, on the models of the house."""

import flax.linen as nn
import pytest

from fm_jax.core.types import Featured, Headed, Tapped, backbone
from fm_jax.models.language import decoder, encoder
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.models.vision import mae, resnet, vit
from fm_jax.models.vision.simclr import SimCLR

GPT, BERT = decoder.Decoder(decoder.tiny()), encoder.Encoder(encoder.tiny())
NET, VIT = resnet.ResNet(resnet.tiny()), vit.ViT(vit.tiny())
MASKED = mae.MAE(mae.decoder(1, 16, 2), VIT)


@pytest.mark.parametrize(
    ("head", "bare"), [(Classifier(GPT, 3), GPT), (MaskedLM(BERT), BERT), (SimCLR(NET, 8), NET), (MASKED, VIT)]
)
def test_a_head_has_the_model_below_it_and_a_model_itself(head, bare):
    assert isinstance(head, Headed) and backbone(head) is bare
    assert not isinstance(bare, Headed) and backbone(bare) is bare


def test_what_reads_images_has_features():
    assert all(isinstance(model, Featured) for model in (NET, VIT))
    assert not any(isinstance(model, Featured) for model in (GPT, BERT, MASKED, Classifier(GPT, 3)))


def test_every_model_has_sites_and_a_layer_has_none():
    assert all(isinstance(model, Tapped) for model in (GPT, BERT, NET, VIT, MASKED, Classifier(GPT, 3)))
    assert not isinstance(nn.Dense(3), Tapped)
