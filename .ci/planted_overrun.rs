//! Memory that is used after it was given back, with `use`, or never given back, with `leak`; neither without. The
//! sanitizer must tell them apart.

fn main() {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    let value = Box::into_raw(Box::new(7u64));
    // SAFETY: `value` came from a box just now.
    let before = unsafe { value.read() };
    if wanted == "leak" {
        return;
    }
    // SAFETY: as above, and it is given back once.
    drop(unsafe { Box::from_raw(value) });
    let after = if wanted == "use" {
        // SAFETY: not upheld, which is the point.
        unsafe { std::hint::black_box(value).read_volatile() }
    } else {
        before
    };
    println!("{after}");
}
