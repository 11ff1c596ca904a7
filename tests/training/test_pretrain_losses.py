"""The losses of the tiny CLIP's pre-training, which is not in the paper."""

import torch
import torch.nn.functional as F
from makers import assert_close, random

from hivg.training.pretrain import patch_similarity, phrase_loss


def test_patch_similarity():
    """Sharp, it is the cosine of the best patch; blunt, the mean over all; and the words are averaged."""
    words = F.normalize(random(3, 2, 8), dim=-1)
    patches = F.normalize(random(4, 5, 8, seed=1), dim=-1)
    cosine = F.cosine_similarity(words[:, :, None, None], patches, dim=-1)  # (3, 2, 4, 5)
    assert_close("sharp", patch_similarity(words, patches, 1e6), cosine.amax(-1).mean(1), 1e-10)
    assert_close("blunt", patch_similarity(words, patches, 0.0), cosine.mean((1, 3)), 1e-10)


def test_phrase_loss():
    """Worked out in loops: what is true is no negative."""
    logits = random(4, 3).requires_grad_()
    is_true = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()  # the last is true of all images
    own = torch.tensor([0, 0, 1, 2])
    terms = []
    for m, b in enumerate(own):
        other_images = [logits[m, j] for j in range(3) if not is_true[m, j]]
        other_phrases = [logits[k, b] for k in range(4) if not is_true[k, b]]
        for negatives in (other_images, other_phrases):
            terms.append(torch.stack([logits[m, b], *negatives]).logsumexp(0) - logits[m, b])
    loss = phrase_loss(logits, is_true, own)
    assert_close("phrases", loss, sum(terms) / 4, 1e-12)
    loss.backward()
    assert logits.grad.isfinite().all() and not logits.grad[0, 2]
