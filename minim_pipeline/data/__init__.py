"""Images and captions in: tables, one image reader, and what is looked at before they are used."""
