//! Calls the adapter and writes what came of it.

use std::io::Write;

use crate::gateway::api::error::ApiError;
use crate::gateway::api::op::{Call, Op};
use crate::platform::adapter::Outlet;
use crate::platform::webchat::{Report, SendOptions, WebChat};
use crate::proto::delivery::Nobody;

/// Does what `op` asks for, and appends the answer to `body`.
pub(super) async fn perform<O: Outlet>(chat: &WebChat<O>, op: Op<'_>, body: &mut Vec<u8>) -> Result<(), ApiError> {
    let Op { channel, call } = op;
    let mut url = None;
    let report = match call {
        Call::Send { text, reply_to } => chat.send_report(&channel, &text, SendOptions { reply_to, id: None }).await?,
        Call::Buttons { text, buttons, reply_to } => {
            chat.send_with_buttons_report(&channel, &text, &buttons, SendOptions { reply_to, id: None }).await?
        }
        Call::File { filename, mimetype, data } => {
            let (report, file_url) = chat.send_file_report(&channel, data, &filename, mimetype.as_deref()).await?;
            url = Some(file_url);
            report
        }
        Call::Edit { id, text } => chat.edit_report(&channel, id, &text).await?,
        Call::Typing { active } => chat.typing_report(&channel, active).await?,
        Call::End { reason } => chat.end_report(&channel, reason).await?,
    };
    write(&report, url.as_deref(), body);
    Ok(())
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
    if let Some(nobody) = delivery.nobody {
        let reason = match nobody {
            Nobody::Offline => "offline",
            Nobody::NoSuchStream => "no_such_stream",
            Nobody::EmptyRoom => "empty_room",
        };
        drop(write!(body, ",\"reason\":\"{reason}\""));
    }
    if let Some(url) = url {
        drop(write!(body, ",\"url\":\"{url}\""));
    }
    body.push(b'}');
}
