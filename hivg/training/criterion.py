"""What a training makes small: a model and its losses in one module."""

import torch

from hivg.clip import CLIP, bounded_logit_scale, similarity
from hivg.data.batches import phrase_truth
from hivg.losses import LossWeights, contrastive_loss, grounding_losses, patch_similarity, phrase_loss
from hivg.training import distributed


class Criterion(torch.nn.Module):
    """A model and its losses, so that data parallelism wraps both and the contrast sees every rank."""

    def __init__(self, model, weights: LossWeights, box_loss):
        """model: a CLIP (its contrastive pre-training) or a HiVG; box_loss: l1 or smooth_l1, for a HiVG."""
        super().__init__()
        self.model, self.weights, self.box_loss = model, weights, box_loss

    def forward(self, batch):
        """-> {name: weighted scalar}, whose sum is the loss."""
        if isinstance(self.model, CLIP):
            return self.pretraining_losses(batch)
        output = self.model(batch["images"], batch["padding_mask"], batch["token_ids"])
        logits = self.logits(output.text_features, output.image_features, self.model.clip.logit_scale)
        image_ids = distributed.gather(batch["image_ids"])
        return grounding_losses(output, batch, logits, image_ids, self.weights, self.box_loss)

    def logits(self, text, image, scale):
        return similarity(distributed.gather(text), distributed.gather(image), scale)

    def pretraining_losses(self, batch):
        """CLIP's contrast of pictures ([CLS]) with captions, by half; and, as [CLS] alone would need many more pictures
        to tell shapes apart, that of patches with phrases, of which the last word and the end token are compared."""
        clip, ids = self.model, batch["phrase_ids"]
        visual = clip.visual.project(clip.visual(batch["images"])[-1])  # (B, N, E)
        logits = self.logits(clip.encode_text(batch["token_ids"]), visual[:, 0], clip.logit_scale)
        phrases = clip.text.project(clip.text(ids)[-1])  # (8 B, T, E)
        end, row = ids.argmax(-1), torch.arange(len(ids), device=ids.device)
        words = distributed.gather(torch.stack([phrases[row, end - 1], phrases[row, end]], dim=1))  # (M, 2, E)
        patches, attributes = distributed.gather(visual[:, 1:]), distributed.gather(batch["attributes"])
        named = distributed.gather(batch["named"])  # (B, 8, 4)
        is_phrase = named[..., 0] > -2  # (B, 8): pictures of fewer objects have fewer phrases
        fit = bounded_logit_scale(clip.logit_scale) * patch_similarity(words[is_phrase.flatten()], patches)
        own = is_phrase.nonzero()[:, 0]  # the picture of each phrase
        return {"clc": 0.5 * contrastive_loss(logits),
                "phrases": phrase_loss(fit, phrase_truth(named[is_phrase], attributes), own)}
