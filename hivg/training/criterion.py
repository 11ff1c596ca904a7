"""A model and its losses in one module, so that data parallelism wraps both."""

import torch

from hivg.clip import similarity
from hivg.losses import LossWeights, grounding_losses
from hivg.training import distributed


class Criterion(torch.nn.Module):
    """HiVG with its losses. The contrastive loss (CLC) sees the expressions and images of all ranks."""

    def __init__(self, model, weights: LossWeights, box_loss):
        """model: a HiVG. box_loss: "l1" or "smooth_l1"."""
        super().__init__()
        self.model = model
        self.weights = weights
        self.box_loss = box_loss

    def has_unused_head(self):
        """Whether a trained part of the model is in no loss, and so gets no gradient: DistributedDataParallel must
        know."""
        w = self.weights
        return not ((w.box or w.giou or w.patch_box) and (w.rtcc_focal or w.rtcc_dice) and (w.mask_focal or w.mask_dice)
                    and (w.clc or not self.model.clip.logit_scale.requires_grad))  # trained with all of CLIP

    def forward(self, batch):
        """batch: this rank's, as `to_device` of hivg/data/batches.py returns it -> {name: weighted scalar}, whose sum
        is the loss."""
        output = self.model(batch["images"], batch["padding_mask"], batch["token_ids"],
                            with_mask=self.weights.mask_focal > 0 or self.weights.mask_dice > 0,
                            with_patch_boxes=self.weights.patch_box > 0,
                            with_reg_attention=self.weights.reg_attention > 0)
        text = distributed.gather(output.text_features.float())  # (n, E), n = B times the ranks
        image = distributed.gather(output.image_features.float())  # (n, E)
        image_ids = distributed.gather(batch["image_ids"])  # (n,)
        present = distributed.gather(batch["present"]) if "present" in batch else None  # (n,)
        with torch.autocast(text.device.type, enabled=False):  # in bfloat16 logits of up to 100 would lose digits
            logits_per_text = similarity(text, image, self.model.clip.logit_scale)  # (n, n)
        return grounding_losses(output, batch, logits_per_text, image_ids, self.weights, self.box_loss, present)
