"""fogsculpt: words become vectors, noise is drawn, a U-Net takes away what does not belong."""

__version__ = "0.1.0"
