//! A frame's compressed WebSocket form (RFC 7692 §6.1), made once, before the frame is shared.

use std::sync::atomic::{AtomicU64, Ordering};

use triomphe::Arc;

use super::{Frame, LIVE_BYTES, ROOM, Rare, websocket_header};
use crate::proto::deflate::{Deflater, Window, with_deflater};

/// The first reserved bit: the message is compressed.
const RSV1: u8 = 0x40;

// Ordering: Relaxed: a statistic, publishes nothing.
static DEFLATES: AtomicU64 = AtomicU64::new(0);

/// How often a frame was compressed in this process, those included whose form was no smaller. Clones and readers do not
/// raise it.
#[must_use]
pub fn deflates() -> u64 {
    DEFLATES.load(Ordering::Relaxed)
}

impl Frame {
    /// Makes the compressed form, if it is a message, none was made, and nobody else holds the frame yet: the forms of a
    /// frame do not change once it is shared. A form that is no smaller is not kept. True if there is one now.
    ///
    /// It takes about 10 µs for 512 bytes of JSON and 100 µs for 16 KiB, and the form counts in [`bytes`](Self::bytes).
    ///
    /// ```
    /// use tabcast::id::MessageId;
    /// use tabcast::proto::event::{Event, Timestamp};
    /// use tabcast::proto::frame::Frame;
    /// let text = "again and ".repeat(100);
    /// let mut frame = Frame::encode(&Event::Edit { id: MessageId::random(), text: &text, timestamp: Timestamp::from_micros(1) });
    /// assert!(frame.deflated().is_none());
    /// assert!(frame.deflate());
    /// assert!(frame.deflated().is_some_and(|form| form[0] == 0xc1 && form.len() < 200));
    /// ```
    pub fn deflate(&mut self) -> bool {
        self.deflate_by(Window::FULL, |deflater, message| deflater.deflate(message))
    }

    /// The same for one tab alone: with its `window`, and kept even if it is no smaller.
    pub fn deflate_for(&mut self, window: Window) -> bool {
        self.deflate_by(window, |deflater, message| deflater.deflate_anyway(message))
    }

    fn deflate_by(
        &mut self,
        window: Window,
        deflate: impl for<'d> FnOnce(&'d mut Deflater, &[u8]) -> Option<&'d [u8]>,
    ) -> bool {
        if self.deflated().is_some() {
            return true;
        }
        let message = self.payload();
        if message.is_empty() || !self.0.with_arc(Arc::is_unique) {
            return false;
        }
        DEFLATES.fetch_add(1, Ordering::Relaxed);
        let first_byte = self.kind().first_byte() | RSV1;
        let form = with_deflater(message.len(), window, |deflater| {
            let payload = deflate(deflater, message)?;
            let mut header = [0; ROOM];
            Some([websocket_header(&mut header, first_byte, payload.len()), payload].concat())
        });
        let window = window.min(Window::around(message.len()));
        let Some(form) = form else { return false };
        self.0.with_arc_mut(|frame| {
            let Some(frame) = Arc::get_mut(frame) else { return false };
            let header = frame.header_mut();
            let mut bytes = form.len();
            let rare = header.rare.get_or_insert_with(|| {
                bytes += size_of::<Rare>();
                Box::default()
            });
            rare.deflated = Some((form.into_boxed_slice(), window));
            header.bytes += bytes;
            LIVE_BYTES.fetch_add(bytes, Ordering::Relaxed);
            true
        })
    }

    /// The compressed WebSocket form, header and payload, unmasked: for a tab that negotiated permessage-deflate. None
    /// if [`deflate`](Self::deflate) made none.
    #[must_use]
    pub fn deflated(&self) -> Option<&[u8]> {
        self.deflated_within(Window::FULL)
    }

    /// The same for a tab that asked for a smaller window: None if the form may refer further back than that.
    #[must_use]
    pub fn deflated_within(&self, window: Window) -> Option<&[u8]> {
        let (form, needed) = self.header().rare.as_ref()?.deflated.as_ref()?;
        (*needed <= window).then_some(&**form)
    }
}
