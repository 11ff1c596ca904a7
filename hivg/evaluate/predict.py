"""A model's predictions on a data set, one row for each expression: what accuracies and comparisons are made of."""

import torch
import torch.nn.functional as F

from hivg.boxes import iou
from hivg.data.batches import to_device


@torch.no_grad()
def predict(model, batches, device="cpu", expressions=None, progress=None, masks=False):
    """Ground every row of the batches -> list of {"image", "expression", "kind", "image_id", "box", "target", "iou",
    "score"}, boxes (xmin, ymin, xmax, ymax) floats in the original image's pixels. The model keeps its mode. For an
    expression that is true of nothing, target is None and iou 0.0: accuracies are those of `metrics.present(rows)`. The
    score is not calibrated. "detail" is added where there is one (Expression).

    expressions: texts to use in place of the batches' own, in their order. progress: called with the number of rows
    done. masks: add "mask_iou", on the model's square, to the rows that have a mask. Raises ValueError for a model
    whose boxes are not finite.
    """
    rows = []
    was_training = model.training
    model.eval()
    for batch in batches:
        texts = batch["expressions"]
        if expressions:
            texts = expressions[len(rows) : len(rows) + len(texts)]
        rows += predict_batch(model, batch, texts, device, masks)
        if progress:
            progress(len(rows))
    model.train(was_training)
    return rows


def predict_batch(model, batch, texts, device, masks):
    """The rows of `predict` for one batch."""
    of_model = {"token_ids": model.tokenizer(texts), "normalization": model.config.normalization}
    on_device = to_device(batch | of_model, model.tokenizer, device)
    with_mask = masks and bool(batch["has_mask"].any())
    output = model(on_device["images"], on_device["padding_mask"], on_device["token_ids"], with_mask=with_mask)
    boxes, scores = model.boxes_and_scores(output)
    if with_mask:
        overlaps = mask_iou(output.mask_logits.float().cpu(), batch["masks"])  # (B,)
    is_present = batch.get("present", [True] * len(texts))
    rows = []
    for i, text in enumerate(texts):
        box = batch["letterboxes"][i].boxes_to_image(boxes[i])  # (4,)
        target = batch["pixel_boxes"][i]
        row = {
            "image": batch["image_names"][i],
            "expression": text,
            "kind": batch["kinds"][i],
            "image_id": int(batch["image_ids"][i]),
            "box": box.tolist(),
            "target": target.tolist() if is_present[i] else None,
            "iou": iou(box, target).item(),
            "score": scores[i],
        }
        if batch["details"][i]:
            row["detail"] = batch["details"][i]
        if with_mask and batch["has_mask"][i]:
            row["mask_iou"] = overlaps[i].item()
        rows.append(row)
    return rows


def mask_iou(logits, masks):
    """Logits (B, 1, h, w) against masks (B, S, S) bool -> IoU (B,). As in the released program: max(sigmoid - 0.5, 0),
    resized to the mask's size, is the mask where it is above 0."""
    found = (logits.sigmoid() - 0.5).clamp(min=0)
    found = F.interpolate(found, masks.shape[1:], mode="bilinear")[:, 0] > 0  # (B, S, S)
    both = (found & masks).flatten(1).sum(1)  # (B,)
    either = (found | masks).flatten(1).sum(1)
    return both / either.clamp(min=1)
