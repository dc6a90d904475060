"""Procedural street scenes seen from a driving car: the built-in data set, and the built-in video.

The world is rows of slots along the road: building lots, street furniture, parked cars, lanes of traffic, people. A
row may move, and what stands in a slot depends on nothing but (seed, row, slot), so the drive goes on for ever and any
frame can be drawn without those before it. Coordinates are metres: x to the right of the road's centre, y up, z ahead
of the camera. Pictures are painted from far to near into one array of four channels, red, green, blue and label, so
that colour and label cannot disagree.
"""

from aicsd_deploy.data.synthetic.scene import render_scene
from aicsd_deploy.data.synthetic.world import CLASSES, NATIVE_SIZE_HW

__all__ = ["CLASSES", "NATIVE_SIZE_HW", "render_scene"]
