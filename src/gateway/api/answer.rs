//! Calls the adapter and writes what came of it.

use std::io::Write;

use crate::gateway::api::error::ApiError;
use crate::gateway::api::op::{Call, Op};
use crate::platform::adapter::Outlet;
use crate::platform::webchat::{Report, SendOptions, Submitted, WebChat};
use crate::proto::delivery::Nobody;

/// A call that was made, and whose answer may not be complete.
pub(super) struct Made<P> {
    submitted: Submitted<P>,
    url: Option<String>,
}

/// Does what `op` asks for. Other nodes may have yet to answer.
pub(super) async fn make<O: Outlet>(chat: &WebChat<O>, op: Op<'_>) -> Result<Made<O::Posted>, ApiError> {
    let Op { channel, call } = op;
    let mut url = None;
    let options = |reply_to| SendOptions { reply_to, ..SendOptions::default() };
    let submitted = match call {
        Call::Send { text, reply_to } => chat.submit_text(&channel, &text, options(reply_to)).await?,
        Call::Buttons { text, buttons, reply_to } => {
            chat.submit_buttons(&channel, &text, &buttons, options(reply_to)).await?
        }
        Call::File { filename, mimetype, data } => {
            let (submitted, file_url) = chat.submit_file(&channel, data, &filename, mimetype.as_deref()).await?;
            url = Some(file_url);
            submitted
        }
        Call::Edit { id, text } => chat.submit_edit(&channel, id, &text).await?,
        Call::Typing { active } => chat.submit_typing(&channel, active).await?,
        Call::End { reason } => chat.submit_end(&channel, reason).await?,
    };
    Ok(Made { submitted, url })
}

/// Appends the answer to `body`, once it is known.
pub(super) async fn report<O: Outlet>(chat: &WebChat<O>, made: Made<O::Posted>, body: &mut Vec<u8>) {
    let Made { submitted, url } = made;
    write(&chat.settle(submitted).await, url.as_deref(), body);
}

/// Nothing here needs an escape: ids are UUIDs, the filename in a URL is percent-encoded.
fn write(report: &Report, url: Option<&str>, body: &mut Vec<u8>) {
    body.push(b'{');
    if let Some(id) = report.id {
        body.extend_from_slice(b"\"id\":\"");
        body.extend_from_slice(id.encode(&mut [0; 36]).as_bytes());
        body.extend_from_slice(b"\",");
    }
    let delivery = &report.delivery;
    let delivered = delivery.is_delivered();
    // Writing to a Vec cannot fail.
    drop(write!(body, "\"delivered\":{delivered},\"tabs\":{},\"nodes\":{}", delivery.tabs, delivery.nodes));
    if delivery.at_least {
        body.extend_from_slice(b",\"at_least\":true");
    }
    if let Some(nobody) = delivery.nobody {
        let reason = match nobody {
            Nobody::Offline => "offline",
            Nobody::NoSuchStream => "no_such_stream",
            Nobody::EmptyRoom => "empty_room",
            Nobody::Waiting => "waiting",
        };
        drop(write!(body, ",\"reason\":\"{reason}\""));
    }
    if let Some(url) = url {
        drop(write!(body, ",\"url\":\"{url}\""));
    }
    body.push(b'}');
}
