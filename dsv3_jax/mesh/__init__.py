"""Where arrays lie on a mesh of devices, and how tokens come to their experts there."""
