"""The paper's training recipes: what differs from train.py's defaults, a row for each data set and size of CLIP.

    python -m hivg.weights fetch ViT-B/16
    python train.py --preset refcoco-base --data_root DIR

Schedule of the released code: ViT-B 60 epochs at 2.5e-4, then 20 each at 1e-4, 5e-5 and 2.5e-5 with global batches of
7 x 80, 60, 60, 40; ViT-L 10 epochs a stage, 7 x 32, the warm-up without the bridge. Here the same batches are added up
on one GPU, or shared by several. Accumulation adds up gradients, not the contrast: that sees `batch_size` expressions
at a time (139 negatives for base, 27 for large, less those of the same picture), whatever the number of processes, where
the released program's sees one GPU's 80, 60, 40 or 32.

Expect (Acc@0.5, paper, from a CLIP fine-tuned on COCO detection; from OpenAI's a few points less): RefCOCO
87.3 / 89.9 / 83.3, RefCOCO+ 78.1 / 84.8 / 68.1, RefCOCOg 78.3 / 78.8, ReferIt 75.2, Flickr30k 82.1. None of these has
been run here.
"""

PAPER = dict(epoch_samples=0, optimizer="adamw", lr=(2.5e-4, 1e-4, 5e-5, 2.5e-5), lora_rank=32, lora_alpha=16.0,
             box_loss="smooth_l1", loss_weights=(2.0, 2.0, 1.0, 20.0, 2.0, 20.0, 2.0), workers=8)
BASE = PAPER | dict(clip="weights/ViT-B-16.pt", epochs=(60, 20, 20, 20), batch_size=140, accumulate=(4, 3, 3, 2))
LARGE = PAPER | dict(clip="weights/ViT-L-14.pt", epochs=(10, 10, 10, 10), batch_size=28, accumulate=(8,),
                     warmup_bridge=False, checkpoint=True)
DATA = {
    "refcoco": dict(dataset="refcoco", text_layers=(12,)),
    "refcoco+": dict(dataset="refcoco+", text_layers=(6, 12)),
    "refcocog": dict(dataset="refcocog", text_layers=tuple(range(1, 13))),
    "referit": dict(dataset="referit", text_layers=(6, 12)),
    "flickr": dict(dataset="flickr", text_layers=(12,)),
    "mixup": dict(dataset="mixup", bridge="projected", text_layers=(12,)),
}
PRESETS = {f"{data}-{size}": row | differs for data, differs in DATA.items()
           for size, row in (("base", BASE), ("large", LARGE))}
PRESETS["flickr-base"] |= dict(epochs=(30, 5, 5, 5))


def preset(name):
    """The settings of a row; none for "". Raises ValueError."""
    if name and name not in PRESETS:
        raise ValueError(f"no preset {name!r:.40}; there are {', '.join(PRESETS)}")
    return PRESETS.get(name, {})
