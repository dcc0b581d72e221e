"""What publishing and exporting raise."""


class PublishError(ValueError):
    """A checkpoint cannot be published or exported as it is; the message says why and what to do."""
