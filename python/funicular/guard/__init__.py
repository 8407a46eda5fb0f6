"""What code meets that touches an offloaded parameter or gradient: tensor classes and the functions of torch that they let through."""
