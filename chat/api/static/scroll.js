// Keeps the newest line in sight while the reader is at the end, and never moves them elsewhere.

/** Pixels from the end that still count as being there, for one who scrolls down to it. */
const NEAR = 40;

export class EndFollower {
  #isFollowing = true;
  #lastTop = 0;

  /** The content grows in the scroller; the jump, a button, leads back to its end. */
  constructor(scroller, content, jump) {
    Object.assign(this, { scroller, content, jump });
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    jump.addEventListener("click", () => this.goToEnd());
    jump.addEventListener("click", () => scroller.focus({ preventScroll: true }));
    const observer = new ResizeObserver(() => this.update());
    observer.observe(scroller);
    observer.observe(content);
  }

  goToEnd() {
    this.#isFollowing = true;
    this.update();
  }

  /** To be called when the content has grown. */
  update() {
    const isEmpty = this.content.childElementCount === 0; // what stands there is read from its top
    if (this.#isFollowing) this.scroller.scrollTop = isEmpty ? 0 : this.scroller.scrollHeight;
    this.jump.hidden = this.#isFollowing;
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    const distance = scrollHeight - scrollTop - clientHeight;
    const moved = scrollTop - this.#lastTop;
    // Content that shrinks moves the reader up as well, but leaves them at the very end.
    if (distance < 2 || (moved > 0 && distance < NEAR)) this.#isFollowing = true;
    else if (moved < 0) this.#isFollowing = false;
    this.#lastTop = scrollTop;
    this.jump.hidden = this.#isFollowing;
  }
}
