"""From hundreds of millions of videos to about a thousand: two towers, the index, candidate sources, blending."""
