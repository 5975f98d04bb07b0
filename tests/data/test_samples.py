"""Taking some of the samples takes all that belongs to them."""

import torch

from optimum_order.evaluation import Images, Windows


def test_windows_are_taken_in_the_order_that_is_asked_for():
    windows = Windows(torch.arange(12).view(4, 3), "made up", bytes=9, note="short")
    some = windows.take(torch.tensor([3, 0]))
    assert some.ids.tolist() == [[9, 10, 11], [0, 1, 2]]
    assert some.bytes is None and (some.source, some.note) == ("made up", "short")
    assert some.digest == Windows(some.ids, "elsewhere").digest != windows.digest
    assert windows.head(2).ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert windows.head(9) is windows.head(4) is windows


def test_images_keep_their_labels():
    images = Images(torch.rand(4, 1, 2, 2), "made up", torch.tensor([5, 6, 7, 8]))
    some = images.take(torch.tensor([2, 1]))
    assert torch.equal(some.pixels, images.pixels[[2, 1]]) and some.labels.tolist() == [7, 6]
    assert images.head(3).labels.tolist() == [5, 6, 7] and images.head(4) is images
    assert Images(images.pixels, "made up").take(torch.tensor([0])).labels is None
